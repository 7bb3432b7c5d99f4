"""FedAvg in NVFlare's simulator, training taking no time: a block of `engine_overhead.py`.

    PYTHON benchmarks/nvflare_peer.py SITES ROUNDS VALUES FOLDER    of an environment with nvflare 2.9.0

NVFlare's own recipe: in-time FedAvg, a process for each client (its default), the model kept after each
round. The model is one array of as many fp32 values, which suits NVFlare better than a hundred tensors.
A client adds a constant of its own, as the other systems' do. There is no evaluation: in NVFlare a client
evaluates what it was sent to train, so a round has half the messages of the others.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

STEP = 1e-3  # times the site's number
SITE = "site-1"  # the rounds' moments are taken there


def client(folder: Path) -> None:
    import nvflare.client as flare

    flare.init()
    me = flare.get_site_name()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        if me == SITE:
            with (folder / "begins").open("a") as file:
                file.write(f"{time.monotonic()}\n")
        for values in model.params.values():
            values += STEP * int(me.rpartition("-")[2])
        flare.send(flare.FLModel(params=model.params, metrics={"accuracy": 0.5}))


def server(sites: int, rounds: int, values: int, folder: Path) -> None:
    import numpy as np
    from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
    from nvflare.recipe import SimEnv

    first = folder / "first.npy"
    np.save(first, np.zeros(values, np.float32))
    recipe = NumpyFedAvgRecipe(
        name="peer",
        initial_ckpt=str(first),
        min_clients=sites,
        # one more: a round ends when the next begins
        num_rounds=rounds + 1,
        train_script=__file__,
        train_args=f"client {folder}",
    )
    recipe.execute(SimEnv(num_clients=sites, workspace_root=str(folder / "workspace")))
    moments = [float(line) for line in (folder / "begins").read_text().split()]
    last = next((folder / "workspace").rglob("server.npy"))
    moved = float(np.load(last).mean(dtype=np.float64))
    print(
        "\n" + json.dumps({"ends": moments[1:], "moved": moved, "rounds": rounds + 1}), flush=True
    )


if __name__ == "__main__":
    if sys.argv[1] == "client":
        client(Path(sys.argv[2]))
    else:
        server(*(int(word) for word in sys.argv[1:4]), Path(sys.argv[4]))
