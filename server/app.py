"""The Flower ServerApp: runs the rounds of the federation whose run folder its configuration names."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config_file import load_config
from common.console import standard_output
from server.checkpoint import RunFolder
from server.history import RoundRecord
from server.roll_call import wait_for_nodes
from server.rounds import run_rounds
from server.tables import round_table

CONNECT_SECONDS = 120.0
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Reads two keys of the run configuration.

    `run-folder` holds `federation.yaml` and receives everything else; `nodes` is how many to wait for.
    """
    folder = RunFolder(Path(str(context.run_config["run-folder"])))
    wait_for_nodes(grid, int(str(context.run_config["nodes"])), CONNECT_SECONDS)
    run_rounds(grid, load_config(folder.config), folder, _print_round)


def _print_round(record: RoundRecord) -> None:
    standard_output().print(round_table(record))
