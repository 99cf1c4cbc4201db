"""Entry points for a fuzzer: `python tests/attack/fuzz.py config` or `header`, then options of libFuzzer.

An exception other than `ProbeError` is a find.
"""

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris
from transformers.utils import logging


with atheris.instrument_imports(include=["llama_probe", "json"]):
    from llama_probe import ProbeConfig, ProbeError, ProbeModel
    from llama_probe.heads.configuration import read_config
    from llama_probe.heads.folder import read_tensors
    from llama_probe.hub.folder import CONFIG_NAME, WEIGHTS_NAME

logging.set_verbosity_error()
CONFIG = ProbeConfig(probe_type="gate", hidden_size=4, num_hidden_layers=1)
SHAPES = {name: tensor.shape for name, tensor in ProbeModel(CONFIG).state_dict().items()}


def fuzz_config(folder: Path, data: bytes) -> None:
    """Read bytes as the config of a head."""
    (folder / CONFIG_NAME).write_bytes(data)
    read_config(folder)


def fuzz_header(folder: Path, data: bytes) -> None:
    """Read bytes as the weights of a head."""
    (folder / WEIGHTS_NAME).write_bytes(data)
    read_tensors(folder, CONFIG, SHAPES)


def main() -> None:
    """Fuzz one of the two."""
    target = {"config": fuzz_config, "header": fuzz_header}[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as scratch:

        def test(data: bytes) -> None:
            with contextlib.suppress(ProbeError):
                target(Path(scratch), data)

        atheris.Setup(sys.argv, test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
