"""Triton kernels of the fused renderer: a triplane's samples, the MLP and the quadrature, forward and backward.

One tile is RAYS neighbouring rays by STEPS consecutive samples, M = RAYS * STEPS rows, row m being sample m % STEPS of
ray m // STEPS. A program walks its tile from the front of the box to the back; all that is between two samples of the
planes and a pixel stays in registers and shared memory.

**Bilinear sampling as a product.** With u, v a sample's place in texels, clamped to [0, R - 1], and
tent(s) = max(0, 1 - |s|),

    bilinear(P)(u, v) = sum_{y, x} tent(v - y) tent(u - x) P[y, x]

A tile is small in space, a few texels of each plane, so the sum needs only the texels between the tile's bounds: a
window of SIDE x SIDE of them at a time gives [M, SIDE^2] weights times [SIDE^2, W] texels, a product for the tensor
cores. Rays that are far apart need more windows, never a different answer. Its transpose is the gradient of the planes:
the tile's rows are summed by the same product before the atomic additions, one a texel and channel of the tile's bounds
instead of 4 a sample and channel.

**Backward.** With v_i = dL/dw_i, w_i = T_i alpha_i and tau_i = sigma_i delta,

    dL/dtau_i = v_i T_{i+1} - sum_{j>i} v_j w_j

where the last sum is the whole, known from the forward pass's results, less what the walk has met already. Activations
of a tile are computed again. Gradients of the MLP are carried through the whole loop of a program, which takes many
tiles, and are added to memory once, at its end. Those of all layers are more than the registers hold, and what spills
goes to the L2 cache, since shared memory leaves no room in the L1: a launch takes hidden layers LOW to HIGH - 1, and
the walk is made again for the others.

Products take bfloat16 and add up in float32. PRECISION "bf16-emulated" rounds alike and multiplies in float32, for
Triton's interpreter, which takes the bits of bfloat16 for integers in a product; products of two bfloat16 are exact in
float32. "fp32" rounds nothing.
"""

import triton
import triton.language as tl

NUM_SUMS = 5
"""What is summed along a ray: w r, w g, w b, w, w t."""


@triton.jit
def _stored(x, PRECISION: tl.constexpr):
    """Round to what products take."""
    if PRECISION == "bf16":
        return x.to(tl.bfloat16)
    elif PRECISION == "bf16-emulated":
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even, as a GPU does and the interpreter does not
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def _mix(bits):
    """Finaliser of MurmurHash3 (Appleby, public domain), on uint32."""
    bits ^= bits >> 16
    bits *= 0x85EBCA6B
    bits ^= bits >> 13
    bits *= 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _axis_entry_exit(origin, direction):
    safe = tl.where(tl.abs(direction) < 1e-9, 1e-9, direction)
    low, high = (-1 - origin) / safe, (1 - origin) / safe
    return tl.minimum(low, high), tl.maximum(low, high)


@triton.jit
def _load_rays(origins, directions, ray, real):
    """Return origin and direction by axis, entry, and length within the box (0 where it is missed)."""
    ox = tl.load(origins + ray * 3, mask=real, other=0.0)
    oy = tl.load(origins + ray * 3 + 1, mask=real, other=0.0)
    oz = tl.load(origins + ray * 3 + 2, mask=real, other=0.0)
    dx = tl.load(directions + ray * 3, mask=real, other=0.0)
    dy = tl.load(directions + ray * 3 + 1, mask=real, other=0.0)
    dz = tl.load(directions + ray * 3 + 2, mask=real, other=0.0)
    near_x, far_x = _axis_entry_exit(ox, dx)
    near_y, far_y = _axis_entry_exit(oy, dy)
    near_z, far_z = _axis_entry_exit(oz, dz)
    near = tl.maximum(tl.maximum(tl.maximum(near_x, near_y), near_z), 0.0)
    far = tl.minimum(tl.minimum(far_x, far_y), far_z)
    length = tl.where(real, tl.maximum(far - near, 0.0), 0.0)
    return ox, oy, oz, dx, dy, dz, near, length


@triton.jit
def _texel(position, resolution):
    """Return the place of a coordinate of [-1, 1] in texels, clamped to the centres of the outer ones."""
    return tl.minimum(tl.maximum((position + 1) * (0.5 * resolution) - 0.5, 0.0), resolution - 1.0)


@triton.jit
def _envelope(origin, direction, near, length, hit, resolution):
    """Return what bounds the places of rays [RAYS] along an axis, in texels: least and greatest at entry, and at exit.

    A ray's place is linear in the step. The least of several linear functions lies above its chord, the greatest below,
    so that lines between these numbers bound the places at all steps, and none need be looked at again.
    """
    a = (origin + near * direction + 1) * (0.5 * resolution) - 0.5
    b = (origin + (near + length) * direction + 1) * (0.5 * resolution) - 0.5
    lows = tl.min(tl.where(hit, a, 1e9), 0), tl.min(tl.where(hit, b, 1e9), 0)
    return lows[0], lows[1], tl.max(tl.where(hit, a, -1e9), 0), tl.max(tl.where(hit, b, -1e9), 0)


@triton.jit
def _envelopes(rays, resolution):
    ox, oy, oz, dx, dy, dz, near, length = rays
    x = _envelope(ox, dx, near, length, length > 0, resolution)
    y = _envelope(oy, dy, near, length, length > 0, resolution)
    return x, y, _envelope(oz, dz, near, length, length > 0, resolution)


@triton.jit
def _bounds(envelope, begin, end, resolution):
    """Return the first and the last texel along an axis that any sample touches in parts begin to end of its ray."""
    low, low_end, high, high_end = envelope
    first = low + tl.minimum(begin * (low_end - low), end * (low_end - low))
    last = high + tl.maximum(begin * (high_end - high), end * (high_end - high))
    # A hundredth of a texel on either side, since a sample's place and the bounds are rounded apart.
    first = tl.minimum(tl.maximum(first - 0.01, 0.0), resolution - 1.0).to(tl.int32)
    last = tl.minimum(tl.maximum(last + 0.01, 0.0), resolution - 1.0).to(tl.int32)
    return first, tl.minimum(last + 1, resolution - 1)


@triton.jit
def _tent(place, first, axis: tl.constexpr, SIDE: tl.constexpr):
    """Return the linear weights of texels first to first + SIDE - 1 at places [M]: [M, 1, SIDE], or [M, SIDE, 1]."""
    texel = (first + tl.arange(0, SIDE)).to(tl.float32)
    return tl.maximum(1 - tl.abs(place[:, None, None] - tl.expand_dims(texel, [0, 3 - axis])), 0.0)


@triton.jit
def _window_weights(u, v, x0, y0, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    """Return the bilinear weights [M, SIDE^2] of the window of texels from (x0, y0) on, row by row, at (u, v) [M]."""
    weights = _tent(v, y0, 1, SIDE) * _tent(u, x0, 2, SIDE)
    return _stored(tl.reshape(weights, [u.shape[0], SIDE * SIDE]), PRECISION)


@triton.jit
def _window(first_x, last_x, first_y, last_y, resolution, index, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """Return a window's first texel (x0, y0), its texels' offsets [SIDE^2, WIDTH] in a plane, and which are inside."""
    across = (last_x - first_x) // SIDE + 1
    x0, y0 = first_x + index % across * SIDE, first_y + index // across * SIDE
    cell, channel = tl.arange(0, SIDE * SIDE), tl.arange(0, WIDTH)
    x, y = x0 + cell % SIDE, y0 + cell // SIDE
    inside = (x <= last_x) & (y <= last_y)
    return x0, y0, (y * resolution + x)[:, None] * WIDTH + channel[None, :], inside[:, None]


@triton.jit
def _num_windows(first_x, last_x, first_y, last_y, SIDE: tl.constexpr):
    return ((last_x - first_x) // SIDE + 1) * ((last_y - first_y) // SIDE + 1)


@triton.jit
def _sample_more(
    hidden, plane, u, v, first_x, last_x, first_y, last_y, resolution,
    WIDTH: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return hidden [M, WIDTH] plus what the windows after the first hold of a plane [R, R, WIDTH] at (u, v) [M]."""
    for index in range(1, _num_windows(first_x, last_x, first_y, last_y, SIDE)):
        x0, y0, offsets, inside = _window(first_x, last_x, first_y, last_y, resolution, index, WIDTH, SIDE)
        texels = tl.load(plane + offsets, mask=inside, other=0.0)
        hidden = tl.dot(_window_weights(u, v, x0, y0, SIDE, PRECISION), texels, hidden, input_precision="ieee")
    return hidden


@triton.jit
def _scatter_plane(
    gradient, grad_plane, u, v, first_x, last_x, first_y, last_y, resolution,
    WIDTH: tl.constexpr, SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to grad_plane [R, R, WIDTH] the gradient of its samples, [M, WIDTH], summed over the tile first."""
    for index in range(0, _num_windows(first_x, last_x, first_y, last_y, SIDE)):
        x0, y0, offsets, inside = _window(first_x, last_x, first_y, last_y, resolution, index, WIDTH, SIDE)
        weights = _window_weights(u, v, x0, y0, SIDE, PRECISION)
        summed = tl.dot(tl.trans(weights), gradient, input_precision="ieee")
        tl.atomic_add(grad_plane + offsets, summed, mask=inside & (summed != 0), sem="relaxed")


@triton.jit
def _one_minus_exp_minus(x):
    """Return 1 - exp(-x) for x >= 0, by its series where the subtraction would cancel."""
    return tl.where(x < 0.05, x * (1 - x / 2 * (1 - x / 3 * (1 - x / 4 * (1 - x / 5)))), 1 - tl.exp(-x))


@triton.jit
def _softplus(x):
    """Return log(1 + exp(x)); the logarithm by its series near 1, where thin densities would be lost to rounding."""
    z = tl.exp(-tl.abs(x))
    series = z * (1 - z * (1 / 2 - z * (1 / 3 - z * (1 / 4 - z * (1 / 5 - z / 6)))))
    return tl.maximum(x, 0.0) + tl.where(z < 0.1, series, tl.log(1 + z))


@triton.jit
def _column(matrix, column, index: tl.constexpr):
    """Return column `index` of a matrix [M, K], whose columns are numbered in `column` [K]."""
    return tl.sum(tl.where(column[None, :] == index, matrix, 0.0), 1)


@triton.jit
def _activate(z, signs, PRECISION: tl.constexpr):
    """Return relu(z) as products take it, and signs, int8 like z, moved up by a bit that tells whether z is positive.

    In bfloat16 this is 1.75 instructions an element, by pairs: h + 0x7FFF has its highest bit set if the bfloat16
    h >= 0 is not 0, and `prmt` spreads that bit over a byte.
    """
    if PRECISION == "bf16":
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            cvt.rn.relu.bf16x2.f32 $0, $4, $3;
            cvt.rn.relu.bf16x2.f32 $1, $6, $5;
            add.u32 a, $0, 0x7FFF7FFF;
            add.u32 b, $1, 0x7FFF7FFF;
            prmt.b32 a, a, b, 0xFDB9;
            shl.b32 b, $7, 1;
            lop3.b32 $2, b, 0xFEFEFEFE, a, 0xE2;
            }""",
            "=&r,=&r,=&r,r,r,r,r,r", [z, signs], (tl.bfloat16, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return _stored(tl.maximum(z, 0.0), PRECISION), (signs << 1) | (z > 0).to(tl.int8)


@triton.jit
def _deactivate(gradient, signs, PRECISION: tl.constexpr):
    """Return the gradient before a ReLU, of that behind it, as products take it, and signs without their lowest bit."""
    if PRECISION == "bf16":
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            shl.b32 a, $7, 7;
            prmt.b32 b, a, 0, 0x9988;
            prmt.b32 a, a, 0, 0xBBAA;
            cvt.rn.bf16x2.f32 $0, $4, $3;
            cvt.rn.bf16x2.f32 $1, $6, $5;
            and.b32 $0, $0, b;
            and.b32 $1, $1, a;
            shr.u32 $2, $7, 1;
            }""",
            "=&r,=&r,=&r,r,r,r,r,r", [gradient, signs], (tl.bfloat16, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return _stored(tl.where((signs & 1) != 0, gradient, 0.0), PRECISION), signs >> 1


@triton.jit
def _matrices(weights, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """Return COUNT matrices [out, in] of weights [COUNT, WIDTH, WIDTH]; loaded once, the compiler keeps them shared."""
    channel = tl.arange(0, WIDTH)
    out = ()
    for layer in tl.static_range(COUNT):
        out = out + (tl.load(weights + layer * WIDTH * WIDTH + channel[:, None] * WIDTH + channel[None, :]),)
    return out


@triton.jit
def _layers(hidden, matrices, biases, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Return the activations [M, WIDTH] after the folded layer and after each hidden one, and their signs by eights."""
    kept, signs = (), ()
    z = hidden
    for layer in tl.static_range(len(matrices) + 1):
        if layer > 0:
            bias = tl.load(biases + (layer - 1) * WIDTH + tl.arange(0, WIDTH))
            z = tl.dot(kept[layer - 1], tl.trans(matrices[layer - 1]), input_precision="ieee") + bias[None, :]
        if layer % 8 == 0:
            done = signs
            eight = tl.zeros(z.shape, tl.int8)
        activation, eight = _activate(z, eight, PRECISION)
        kept = kept + (activation,)
        signs = done + (eight,)
    return kept, signs


@triton.jit
def _places(first_step, near, length, ray, num_samples, seed_low, seed_high, STEPS: tl.constexpr, JITTER: tl.constexpr):
    """Return the distances of the rows' samples [M], and whether each is one (the last step may be short)."""
    step = first_step + tl.arange(0, near.shape[0]) % STEPS
    offset = 0.5
    if JITTER:
        bits = _mix(_mix(ray.to(tl.uint32) + seed_low.to(tl.uint32)) ^ seed_high.to(tl.uint32))
        bits = _mix(bits + step.to(tl.uint32) * 0x9E3779B9)
        offset = (bits >> 8).to(tl.float32) * (1.0 / 16777216)
    return near + (step.to(tl.float32) + offset) * (length / num_samples), step < num_samples


@triton.jit
def _load_tile(origins, directions, order, tile, tiles, num_rays, RAYS: tl.constexpr, STEPS: tl.constexpr):
    """Return a tile's rays [RAYS], which are real, the same of its rows [M], and what `_load_rays` gives of both."""
    index, item = tile % tiles, tile // tiles
    ray = tl.load(order + index * RAYS + tl.arange(0, RAYS))
    row_ray = tl.load(order + index * RAYS + tl.arange(0, RAYS * STEPS) // STEPS)
    real, row_real = ray >= 0, row_ray >= 0
    ray += item * num_rays
    row_ray += item * num_rays
    rays = _load_rays(origins, directions, ray, real)
    rows = _load_rays(origins, directions, row_ray, row_real)
    return ray, real, row_ray, row_real, rays, rows


@triton.jit
def _sample_tile(
    planes, envelopes, rows, row_ray, first, num_samples, resolution, seed_low, seed_high,
    WIDTH: tl.constexpr, STEPS: tl.constexpr, SIDE: tl.constexpr, JITTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sample planes [3, R, R, WIDTH] at the rows of a tile's steps from `first` on.

    Returns:
        the sum of the three samples [M, WIDTH], distances [M], which rows are samples [M], places in texels along x, y
        and z [M] each, and the first and last texel along each.
    """
    px, py, pz, qx, qy, qz, row_near, row_length = rows
    begin, end = first / num_samples, tl.minimum((first + STEPS) / num_samples, 1.0)
    x0, x1 = _bounds(envelopes[0], begin, end, resolution)
    y0, y1 = _bounds(envelopes[1], begin, end, resolution)
    z0, z1 = _bounds(envelopes[2], begin, end, resolution)
    t, valid = _places(first, row_near, row_length, row_ray, num_samples, seed_low, seed_high, STEPS, JITTER)
    u, v, w = _texel(px + t * qx, resolution), _texel(py + t * qy, resolution), _texel(pz + t * qz, resolution)
    area = resolution * resolution * WIDTH
    # The first windows, which hold all in half of the cases, are asked for together: nothing else hides their latency.
    ax, ay, offsets_a, inside_a = _window(x0, x1, y0, y1, resolution, 0, WIDTH, SIDE)
    bx, by, offsets_b, inside_b = _window(x0, x1, z0, z1, resolution, 0, WIDTH, SIDE)
    cx, cy, offsets_c, inside_c = _window(y0, y1, z0, z1, resolution, 0, WIDTH, SIDE)
    texels_a = tl.load(planes + offsets_a, mask=inside_a, other=0.0)
    texels_b = tl.load(planes + area + offsets_b, mask=inside_b, other=0.0)
    texels_c = tl.load(planes + 2 * area + offsets_c, mask=inside_c, other=0.0)
    hidden = tl.dot(_window_weights(u, v, ax, ay, SIDE, PRECISION), texels_a, input_precision="ieee")
    hidden = tl.dot(_window_weights(u, w, bx, by, SIDE, PRECISION), texels_b, hidden, input_precision="ieee")
    hidden = tl.dot(_window_weights(v, w, cx, cy, SIDE, PRECISION), texels_c, hidden, input_precision="ieee")
    hidden = _sample_more(hidden, planes, u, v, x0, x1, y0, y1, resolution, WIDTH, SIDE, PRECISION)
    hidden = _sample_more(hidden, planes + area, u, w, x0, x1, z0, z1, resolution, WIDTH, SIDE, PRECISION)
    hidden = _sample_more(hidden, planes + 2 * area, v, w, y0, y1, z0, z1, resolution, WIDTH, SIDE, PRECISION)
    return hidden, t, valid, (u, v, w), (x0, x1, y0, y1, z0, z1)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "zero"])
def forward_kernel(
    planes, weights, biases, out_weight, out_bias, origins, directions, order, sums,
    tiles, num_rays, num_samples, resolution, density_bias, seed_low, seed_high, zero,
    NUM_HIDDEN: tl.constexpr, WIDTH: tl.constexpr, RAYS: tl.constexpr, STEPS: tl.constexpr, SIDE: tl.constexpr,
    JITTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum samples along the rays of one tile: sums [B, num_rays, NUM_SUMS], which is zero before.

    planes [B, 3, R, R, WIDTH], weights [NUM_HIDDEN, WIDTH, WIDTH], out_weight [16, WIDTH] of which 4 rows count,
    origins and directions [B, num_rays, 3], order [tiles * RAYS] the rays of each tile, -1 for none. zero is 0, unknown
    to the compiler, which would otherwise load all biases before the loop and fill the registers with them.
    """
    M: tl.constexpr = RAYS * STEPS
    column, channel = tl.arange(0, 16), tl.arange(0, WIDTH)
    tile = tl.program_id(0)
    ray, real, row_ray, _row_real, rays, rows = _load_tile(
        origins, directions, order, tile, tiles, num_rays, RAYS, STEPS
    )
    planes += (tile // tiles).to(tl.int64) * 3 * resolution * resolution * WIDTH
    end = tl.where(tl.max(rays[7], 0) > 0, num_samples, 0)  # nothing is done for a tile that misses the box

    envelopes = _envelopes(rays, resolution)
    matrices = _matrices(weights, NUM_HIDDEN, WIDTH)
    out_weights = tl.load(out_weight + column[:, None] * WIDTH + channel[None, :])
    out_biases = tl.load(out_bias + column)
    depth = tl.zeros([RAYS], tl.float32)
    total = tl.zeros([RAYS, 16], tl.float32)
    for first in range(0, end, STEPS):
        hidden, t, valid, _places_in, _bounds_of = _sample_tile(
            planes, envelopes, rows, row_ray, first, num_samples, resolution, seed_low, seed_high,
            WIDTH, STEPS, SIDE, JITTER, PRECISION,
        )  # fmt: skip
        kept, _signs = _layers(hidden, matrices, biases + first * zero, WIDTH, PRECISION)
        raw = tl.dot(kept[NUM_HIDDEN], tl.trans(out_weights), input_precision="ieee") + out_biases[None, :]

        density = _softplus(_column(raw, column, 3) + density_bias)
        optical = tl.reshape(tl.where(valid, density * (rows[7] / num_samples), 0.0), [RAYS, STEPS])
        before = depth[:, None] + tl.cumsum(optical, 1) - optical
        weight = tl.reshape(tl.exp(-before) * _one_minus_exp_minus(optical), [M])
        value = _values(raw, t, column)
        total += tl.sum(tl.reshape(weight[:, None] * value, [RAYS, STEPS, 16]), 1)
        depth += tl.sum(optical, 1)
    tl.store(sums + ray[:, None] * 5 + column[None, :], total, mask=real[:, None] & (column < 5)[None, :])


@triton.jit
def _values(raw, t, column):
    """Return what is summed along rays, [M, 16]: the colour in columns 0 to 2, then 1, then the distance."""
    colour = tl.where(column[None, :] < 3, tl.sigmoid(raw), 0.0)
    return colour + tl.where(column[None, :] == 3, 1.0, 0.0) + tl.where(column[None, :] == 4, t[:, None], 0.0)


@triton.jit
def _zeros(COUNT: tl.constexpr, WIDTH: tl.constexpr):
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([WIDTH, WIDTH], tl.float32),)
    return out


@triton.jit
def _layers_backward(
    d_hidden, kept, signs, matrices, d_weights, d_biases,
    NUM_HIDDEN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go back through the hidden layers, from the gradient of the last one's activations [M, WIDTH].

    Returns:
        the gradient of the folded layer's output if LOW is 0, d_weights (the last layer's first) and d_biases
        [16, WIDTH], of layers LOW to HIGH - 1, with this tile's added. Those of biases are a product with rows of ones,
        which is cheaper than a sum over the tile.
    """
    new_weights = ()
    for back in tl.static_range(NUM_HIDDEN + 1 - LOW):
        if back == 0:
            eight = signs[NUM_HIDDEN // 8]
        elif (NUM_HIDDEN - back) % 8 == 7:
            eight = signs[(NUM_HIDDEN - back) // 8]
        if back < NUM_HIDDEN - LOW or LOW == 0:
            d_z, eight = _deactivate(d_hidden, eight, PRECISION)
        if back < NUM_HIDDEN - LOW:
            if back >= NUM_HIDDEN - HIGH:
                before = tl.trans(d_z)
                d_weight = d_weights[back - (NUM_HIDDEN - HIGH)]
                d_weight = tl.dot(before, kept[NUM_HIDDEN - 1 - back], d_weight, input_precision="ieee")
                new_weights = new_weights + (d_weight,)
                row = tl.arange(0, 16)[:, None] + tl.zeros([1, d_z.shape[0]], tl.int32)
                ones = _stored(tl.where(row == NUM_HIDDEN - 1 - back - LOW, 1.0, 0.0), PRECISION)
                d_biases = tl.dot(ones, d_z, d_biases, input_precision="ieee")
            if back < NUM_HIDDEN - LOW - 1 or LOW == 0:
                d_hidden = tl.dot(d_z, matrices[NUM_HIDDEN - 1 - back], input_precision="ieee")
    return d_z, new_weights, d_biases


@triton.jit(do_not_specialize=["seed_low", "seed_high", "zero"])
def backward_kernel(
    planes, weights, biases, out_weight, out_bias, origins, directions, order, sums, grad_sums,
    grad_planes, grad_weights, grad_biases, grad_out_weight, grad_out_bias,
    tiles, num_tiles, num_rays, num_samples, resolution, density_bias, seed_low, seed_high, zero,
    NUM_HIDDEN: tl.constexpr, WIDTH: tl.constexpr, RAYS: tl.constexpr, STEPS: tl.constexpr, SIDE: tl.constexpr,
    JITTER: tl.constexpr, PRECISION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Add the gradients of grad_sums [B, num_rays, NUM_SUMS] to those of planes and MLP, all float32 and zero before.

    As in `forward_kernel`. A program takes every num_programs-th of the num_tiles = B * tiles tiles. Of the hidden
    layers only LOW to HIGH - 1, 16 at most, get their gradients; the output gets its own if HIGH is NUM_HIDDEN, the
    planes get theirs if LOW is 0.
    """
    M: tl.constexpr = RAYS * STEPS
    column, channel = tl.arange(0, 16), tl.arange(0, WIDTH)
    square = channel[:, None] * WIDTH + channel[None, :]
    area = resolution * resolution * WIDTH
    matrices = _matrices(weights, NUM_HIDDEN, WIDTH)
    out_weights = tl.load(out_weight + column[:, None] * WIDTH + channel[None, :])
    out_biases = tl.load(out_bias + column)
    d_weights = _zeros(HIGH - LOW, WIDTH)
    d_biases = tl.zeros([16, WIDTH], tl.float32)
    d_out_weight = tl.zeros([16, WIDTH], tl.float32)
    d_out_raw = tl.zeros([M, 16], tl.float32)

    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        item_offset = (tile // tiles).to(tl.int64) * 3 * area
        ray, real, row_ray, row_real, rays, rows = _load_tile(
            origins, directions, order, tile, tiles, num_rays, RAYS, STEPS
        )
        end = tl.where(tl.max(rays[7], 0) > 0, num_samples, 0)
        envelopes = _envelopes(rays, resolution)
        summed = (column < 5)[None, :]
        sum_of = tl.load(sums + ray[:, None] * 5 + column[None, :], mask=real[:, None] & summed, other=0.0)
        g_of = tl.load(grad_sums + ray[:, None] * 5 + column[None, :], mask=real[:, None] & summed, other=0.0)
        left = tl.sum(sum_of * g_of, 1)  # sum of v_j w_j over the samples still ahead
        row_g = tl.load(grad_sums + row_ray[:, None] * 5 + column[None, :], mask=row_real[:, None] & summed, other=0.0)
        depth = tl.zeros([RAYS], tl.float32)
        for first in range(0, end, STEPS):
            hidden, t, valid, places, bounds = _sample_tile(
                planes + item_offset, envelopes, rows, row_ray, first, num_samples, resolution, seed_low, seed_high,
                WIDTH, STEPS, SIDE, JITTER, PRECISION,
            )  # fmt: skip
            u, v, w = places
            x0, x1, y0, y1, z0, z1 = bounds
            kept, signs = _layers(hidden, matrices, biases + first * zero, WIDTH, PRECISION)
            raw = tl.dot(kept[NUM_HIDDEN], tl.trans(out_weights), input_precision="ieee") + out_biases[None, :]

            shifted = _column(raw, column, 3) + density_bias
            delta = tl.where(valid, rows[7] / num_samples, 0.0)
            optical = tl.reshape(_softplus(shifted) * delta, [RAYS, STEPS])
            after = depth[:, None] + tl.cumsum(optical, 1)
            weight = tl.exp(optical - after) * _one_minus_exp_minus(optical)
            value = _values(raw, t, column)
            gain = tl.reshape(tl.sum(row_g * value, 1), [RAYS, STEPS])  # v
            ahead = left[:, None] - tl.cumsum(gain * weight, 1)
            d_optical = tl.reshape(gain * tl.exp(-after) - ahead, [M])
            left -= tl.sum(gain * weight, 1)
            depth += tl.sum(optical, 1)
            d_density = d_optical * delta * tl.sigmoid(shifted)
            d_colour = tl.reshape(weight, [M])[:, None] * row_g * value * (1 - value)
            d_raw = tl.where(column[None, :] < 3, d_colour, tl.where(column[None, :] == 3, d_density[:, None], 0.0))

            if HIGH == NUM_HIDDEN:
                d_out_raw += d_raw
            d_raw = _stored(d_raw, PRECISION)
            if HIGH == NUM_HIDDEN:
                d_out_weight = tl.dot(tl.trans(d_raw), kept[NUM_HIDDEN], d_out_weight, input_precision="ieee")
            d_hidden = tl.dot(d_raw, out_weights, input_precision="ieee")
            d_z, d_weights, d_biases = _layers_backward(
                d_hidden, kept, signs, matrices, d_weights, d_biases, NUM_HIDDEN, LOW, HIGH, PRECISION
            )
            if LOW == 0:
                grads = grad_planes + item_offset
                _scatter_plane(d_z, grads, u, v, x0, x1, y0, y1, resolution, WIDTH, SIDE, PRECISION)
                _scatter_plane(d_z, grads + area, u, w, x0, x1, z0, z1, resolution, WIDTH, SIDE, PRECISION)
                _scatter_plane(d_z, grads + 2 * area, v, w, y0, y1, z0, z1, resolution, WIDTH, SIDE, PRECISION)

    for back in tl.static_range(HIGH - LOW):
        layer = HIGH - 1 - back
        tl.atomic_add(grad_weights + layer * WIDTH * WIDTH + square, d_weights[back], sem="relaxed")
    own = grad_biases + LOW * WIDTH + column[:, None] * WIDTH + channel[None, :]
    tl.atomic_add(own, d_biases, mask=(column < HIGH - LOW)[:, None], sem="relaxed")
    if HIGH == NUM_HIDDEN:
        tl.atomic_add(grad_out_weight + column[:, None] * WIDTH + channel[None, :], d_out_weight, sem="relaxed")
        tl.atomic_add(grad_out_bias + column, tl.sum(d_out_raw, 0), sem="relaxed")
