"""Options that several commands share."""

from typing import Annotated

import typer


Backbone = Annotated[str, typer.Option(help="'demo' (SmolLM2-135M-Instruct from PyPI), a folder, or a Hub id.")]
Dtype = Annotated[str, typer.Option(help="dtype of the backbone: auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on standard output.")]
Probe = Annotated[str, typer.Option(help="A head folder, a Hub id (user/repo@revision:subfolder) or an alias.")]
Probes = Annotated[list[str], typer.Option("--probe", help="A head folder, a Hub id or an alias; may be given again.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a head on the Hub.")]
