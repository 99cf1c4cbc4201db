"""`python -m llama_probe.cli`, for `torchrun -m llama_probe.cli`."""

from . import main


main()
