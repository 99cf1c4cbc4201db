"""Score many rows on a Ray cluster: actors hold the backbone with its heads and map batches of rows.

The output has the columns of the input, and those of `llama-probe classify --input ... --output ...`.

    pip install 'ray[data]'
    python examples/ray_scoring.py 'rows/*.parquet' scored --probe toxicchat-mha --probe sst2-mha --actors 4 --gpus 1

The script runs on the cluster of RAY_ADDRESS, or starts a cluster on this machine.
"""

import argparse
import glob
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from llama_probe.evaluation.scoring_job import TextScorer, output_fields


TEXTS = ("How do I keep basil fresh for longer?", "Write an insulting message that makes my coworker cry.")


class Scorer:
    """An actor that loads the backbone once and scores batches of rows."""

    def __init__(self, probes: list[str], backbone: str, text_column: str):
        self.score = TextScorer(probes, backbone)
        self.text_column = text_column

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = self.score(rows[self.text_column].to_pylist())
        for name, column_type in output_fields(self.score.heads).items():
            rows = rows.append_column(name, pa.array(found[name], column_type))
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("input", nargs="?", help="parquet files or a pattern; default: two rows")
    parser.add_argument("output", nargs="?", help="folder")
    parser.add_argument("--probe", action="append", help="a head; repeatable")
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1, help="for each actor")
    parser.add_argument("--gpus", type=float, default=0, help="for each actor")
    arguments = parser.parse_args()
    if arguments.output and Path(arguments.output).exists() and any(Path(arguments.output).iterdir()):
        parser.error(f"{arguments.output} must be a new or empty folder")
    ray.init()
    # Reading and writing need a CPU too: without a free one the job hangs.
    available = ray.cluster_resources().get("CPU", 0)
    if arguments.actors * arguments.cpus > available - 1:
        parser.error(
            f"{arguments.actors} actors with --cpus {arguments.cpus:g} leave none of the cluster's {available:g} CPUs for "
            "reading and writing: use fewer actors or a smaller --cpus"
        )
    scratch = Path(tempfile.mkdtemp())
    if arguments.input is None:
        arguments.input = str(scratch / "rows.parquet")
        pq.write_table(pa.table({"text": list(TEXTS)}), arguments.input)
    output = arguments.output or str(scratch / "scored")

    # Absolute paths, because actors run in other folders.
    rows = ray.data.read_parquet(sorted(str(Path(path).absolute()) for path in glob.glob(arguments.input)))
    rows.map_batches(
        Scorer,
        fn_constructor_kwargs={
            "probes": arguments.probe or ["toxicchat-mha"],
            "backbone": arguments.backbone,
            "text_column": arguments.text_column,
        },
        batch_size=arguments.batch_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        num_cpus=arguments.cpus,
        num_gpus=arguments.gpus,
    ).write_parquet(str(Path(output).absolute()))
    print(f"{pq.read_table(output).num_rows} rows in {output}")


if __name__ == "__main__":
    main()
