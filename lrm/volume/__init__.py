"""Volume rendering of a triplane; `reference` is the readable one that judges every faster one."""
