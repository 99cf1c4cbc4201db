"""`python -m llama_probe.cli`, for `torchrun -m llama_probe.cli`."""

from ..cli import main


main()
