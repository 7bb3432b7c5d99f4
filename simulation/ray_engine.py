"""Flower's own Ray engine, for several GPUs or machines: the same apps, the same numbers.

Needs the optional extra (`pip install -e '.[ray]'` in fedbrats' folder). Ray's workers are told which
node is which site here, because Flower's simulation gives its nodes nothing but a number.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.environment import prepare_environment


class RayMissing(RuntimeError):
    """The optional extra is not installed."""


def require_ray() -> None:
    """Raises:
    RayMissing: ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise RayMissing("The Ray engine is not installed: pip install -e '.[ray]' in its folder.")


def run_on_ray(
    server_app: ServerApp,
    client_app: ClientApp,
    run_folder: Path,
    site_folders: Mapping[int, Path],
    *,
    cpus_per_site: int,
    gpus_per_site: float,
) -> None:
    """Run one federation to its end; exceptions of the ServerApp pass through.

    Raises:
        RayMissing: ray is not installed.
    """
    require_ray()
    prepare_environment()  # before Ray is imported; its workers inherit the environment
    from flwr.simulation import run_simulation

    folders = [str(folder) for folder in site_folders.values()]

    placed_server = ServerApp()

    @placed_server.main()
    def serve(grid: Grid, context: Context) -> None:
        context.run_config["run-folder"] = str(run_folder)
        context.run_config["nodes"] = len(folders)
        server_app(grid, context)

    placed_client = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        context.node_config["site-folder"] = folders[int(context.node_config["partition-id"])]
        return client_app(message, context)

    placed_client.query()(answer)
    placed_client.train()(answer)
    placed_client.evaluate()(answer)

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the only way in for a Python program
        run_simulation(
            server_app=placed_server,
            client_app=placed_client,
            num_supernodes=len(folders),
            backend_config={
                "client_resources": {"num_cpus": cpus_per_site, "num_gpus": gpus_per_site},
                "init_args": {"log_to_driver": False},
            },
        )
