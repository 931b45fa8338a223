"""Options that several verbs share, so that one name means one thing on the whole command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecPath = Annotated[Path, typer.Option("--spec", help="dataset spec, a TOML file; examples in jobs/specs/")]
Corpus = Annotated[str, typer.Option("--corpus", help="a folder, or s3://, gs://, az:// URL")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key of the spec, such as render.samples=32; repeatable")
]
Deep = Annotated[bool, typer.Option(help="read and decode every sample")]
VersionText = Annotated[str, typer.Option(help="a number, or latest")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout")]
