"""Makes one client misbehave, from outside the product: Python imports this file by itself where its
folder is on PYTHONPATH, which the tests set for that one client.

$FAULTS names a folder that a test may change at any time. `plan.json` in it says what goes wrong in
the training of which round ({"2": "nan"}). A file `hold-train-3` or `hold-evaluate-3` makes that
task of round 3 wait until the file is gone; that it waits shows in a file `holding-train-3`.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["FAULTS"])


def hold(task, round_):
    while (FOLDER / f"hold-{task}-{round_}").exists():
        (FOLDER / f"holding-{task}-{round_}").touch()
        time.sleep(0.05)


def misbehave(app):
    """Wrap what `client.app` has imported. Only one task at a time runs in a client."""
    train, evaluate, weights_of = app.train, app.evaluate, app.weights_of
    fault = None

    def faulty_train(network, subjects, config, *, round_, **rest):
        nonlocal fault
        hold("train", round_)
        fault = json.loads((FOLDER / "plan.json").read_text()).get(str(round_))
        if fault == "raise":
            raise RuntimeError("cannot read /hospital/secret/patient-17")
        if fault == "exit":
            os._exit(3)
        while fault == "hang":
            time.sleep(0.05)
        outcome = train(network, subjects, config, round_=round_, **rest)
        parameter = next(network.parameters()).data
        if fault == "nan":
            parameter[(0,) * parameter.ndim] = float("nan")
        if fault == "huge":
            parameter.mul_(1e9)
        return outcome

    def faulty_evaluate(*arguments, what, **rest):
        hold("evaluate", what.split(",")[0].removeprefix("round "))
        return evaluate(*arguments, what=what, **rest)

    def faulty_weights_of(network):
        weights = weights_of(network)
        if fault == "shape":
            name = next(iter(weights))
            weights[name] = weights[name][:1].repeat_interleave(7, 0)
        return weights

    private_answers = sys.modules["client.private_answers"]
    train_privately = private_answers.train_privately

    def held_train_privately(*arguments, round_, **rest):
        hold("private", round_)  # it is paid, and no gradient is computed yet
        return train_privately(*arguments, round_=round_, **rest)

    private_answers.train_privately = held_train_privately
    app.train, app.evaluate, app.weights_of = faulty_train, faulty_evaluate, faulty_weights_of


class AfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "client.app":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_misbehave(module):
            execute(module)
            misbehave(module)

        spec.loader.exec_module = execute_and_misbehave
        return spec


sys.meta_path.insert(0, AfterImport())
