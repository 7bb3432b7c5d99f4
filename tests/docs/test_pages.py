"""docs/hospital.md and docs/coordinator.md, typed line by line: one coordinator, three hospitals.

The pages' own lines are run, from `git clone` to the exported model, by the programs that the pages'
installation gives, over TLS on loopback. `instead_of` says what stands for the pages' example names;
`ADDED` what a line gets to be quick. A line that nobody typed fails the test.
"""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import shlex
import shutil
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("hospital.md", "coordinator.md")
HOSPITALS = ("Oslo", "Bergen", "Tromso")
PATIENCE = 120.0  # seconds for any one thing to happen
# without downloads: what fedbrats needs is in the environment that runs the tests
INSTALL = "/opt/fedbrats/bin/pip install --constraint fedbrats/constraints.txt ./fedbrats"
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")

FEDERATION = "/srv/fedbrats/federation"
SITE = "/srv/fedbrats/site"


@dataclass
class Page:
    """A page's shell lines in order, and which of them were typed."""

    lines: list[str]
    typed: list[str] = field(default_factory=list)

    def type(self, line: str) -> str:
        """Note that a line is typed: it must be on the page, and not before the ones above it."""
        assert line in self.lines, f"not on the page: {line}"
        following = self.lines[len(self.typed) :]
        if following and line == following[0]:
            self.typed.append(line)
        assert line in self.typed, f"typed too early, before {following[0]}"
        return line


def shell_lines(text: str) -> list[str]:
    """The lines of all ```sh blocks, continued ones joined."""
    lines = []
    for block in re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {
        name: Page(shell_lines((ROOT / "docs" / name).read_text(encoding="utf-8")))
        for name in PAGES
    }


@dataclass
class Running:
    """A command that goes on; what it says is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self) -> int:
        return self.process.wait(PATIENCE)

    def until(self, text: str) -> None:
        eventually(lambda: text in self.log.read_text(), f"{text!r} in {self.log}", self.text)

    def text(self) -> str:
        return self.log.read_text()


@dataclass
class Person:
    """Somebody with a machine (a folder), a shell in it, and a page to follow."""

    name: str
    machine: Path
    page: Page
    words: dict[str, str]
    environment: dict[str, str]
    running: list[Running] = field(default_factory=list)

    def types(self, line: str, *added: str, expect: int = 0) -> str:
        """Type a line of the page and wait for its end; returns what it printed."""
        done = subprocess.run(
            ["bash", "-c", self._command(line, added)],
            cwd=self.machine,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == expect, f"{self.name}: {line}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def leaves_running(self, line: str, *added: str) -> Running:
        """Type a line that goes on, without a terminal."""
        log = self.machine / f"log-{len(self.running)}.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {self._command(line, added)}"],
                cwd=self.machine,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(Running(process, log))
        return self.running[-1]

    def types_on_a_terminal(self, line: str, answer: str) -> Running:
        """Type a line on a terminal, and the answer when it asks for one."""
        log = self.machine / f"log-{len(self.running)}.txt"
        log.touch()
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {self._command(line, ())}"],
            cwd=self.machine,
            env=self.environment | {"TERM": "xterm", "COLUMNS": "120"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)

        def listen() -> None:
            with log.open("ab") as file:
                try:
                    while data := os.read(ours, 4096):
                        file.write(data)
                        file.flush()
                except OSError:  # the other end is closed
                    os.close(ours)

        threading.Thread(target=listen, daemon=True).start()
        self.running.append(Running(process, log))
        self.running[-1].until("Type yes: ")
        os.write(ours, f"{answer}\n".encode())
        return self.running[-1]

    def adopts(self, line: str) -> None:
        """Type a line that changes the shell itself."""
        command = f"{self._command(line, ())} && env -0"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.machine,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        pairs = (entry.partition("=") for entry in done.stdout.split("\0") if entry)
        self.environment |= {key: value for key, _, value in pairs}

    def path(self, text: str) -> Path:
        """Where something of the page's is on this machine."""
        return self.machine / self.translated(text)

    def translated(self, line: str) -> str:
        for word, instead in self.words.items():
            line = line.replace(word, instead)
        return line

    def _command(self, line: str, added: tuple[str, ...]) -> str:
        command = self.translated(self.page.type(line))
        return " ".join((command, *map(shlex.quote, added)))


def eventually(look: Callable[[], bool], what: str, told: Callable[[], str] = str) -> None:
    until = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < until, f"waited in vain for {what}\n{told()}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository to clone, with this working tree's tracked files and one module more."""
    folder = tmp_path_factory.mktemp("published")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "common" / "outdated.py").write_text('"""Is gone in the next commit."""\n')
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", "--all", "--force")
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    git(folder, *author, "commit", "--quiet", "--all", "--message=as it is")


@contextmanager
def nobody_left(people: list[Person]) -> Iterator[None]:
    """Whatever happens, no process stays behind."""
    try:
        yield
    finally:
        for person in people:
            for running in person.running:
                if running.process.poll() is None:
                    os.killpg(running.process.pid, signal.SIGKILL)
                    running.process.wait()


@pytest.fixture
def people(
    pages: dict[str, Page], published: Path, tmp_path: Path
) -> Iterator[tuple[Person, dict[str, Person]]]:
    """The coordinator and the hospitals; programs are installed once, /opt is common to all."""
    from sites.phantom_cohort import write_cohort

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    folk = {}
    for number, name in enumerate(("coordinator", *HOSPITALS)):
        machine = tmp_path / name
        (machine / "srv" / "fedbrats").mkdir(parents=True)
        page = pages["coordinator.md" if number == 0 else "hospital.md"]
        instead_of = {
            "https://git.example.org/fedbrats.git": str(published),
            "/opt/fedbrats": str(tmp_path / "opt" / "fedbrats"),
            "/srv/fedbrats": str(machine / "srv" / "fedbrats"),
            "/data/brats": str(machine / "scans"),
            "fed.example.org": "127.0.0.1",
        }
        if number > 0:
            instead_of["Oslo"] = name
            write_cohort(
                machine / "scans", sites=1, subjects_per_site=5, shape=(32, 32, 20), seed=number
            )
        folk[name] = Person(name, machine, page, instead_of, dict(environment))
    coordinator = folk.pop("coordinator")
    with nobody_left([coordinator, *folk.values()]):
        yield coordinator, folk


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def digits(text: str, after: str) -> list[str]:
    """Groups of 5 digits, to be compared by telephone, on the lines that begin so."""
    return re.findall(rf"^ *{after} +((?:\d{{5}} ?){{8}})$", text, re.MULTILINE)


def terms_hash(text: str) -> str:
    return re.findall(r"Hash of these terms: ([0-9a-f]{64})", text)[-1]


def rounds_done(coordinator: Person) -> int:
    path = coordinator.path(FEDERATION) / "status.json"
    return int(json.loads(path.read_text())["rounds_done"]) if path.exists() else 0


def sent(hospital: Person) -> list[str]:
    """The kinds of everything that has left this hospital."""
    from client.hospital import HospitalFolder
    from client.outbound import departures

    record = HospitalFolder(hospital.path(SITE)).audit
    return [departure["kind"] for departure in departures(record)]


@pytest.mark.slow
def test_a_federation_by_the_two_pages_alone(people, pages, published, tiny_arguments):
    coordinator, hospitals = people
    oslo, bergen, tromso = hospitals.values()

    # --- install, once for all
    bergen.types("git clone https://git.example.org/fedbrats.git fedbrats")
    bergen.types("python3 -m venv /opt/fedbrats")
    here = bergen.path("/opt/fedbrats/lib") / f"python3.{sys.version_info[1]}" / "site-packages"
    (here / "what-the-tests-have.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    shutil.rmtree(here / "setuptools", ignore_errors=True)  # Python 3.11's own is too old
    bergen.types(INSTALL, *OFFLINE)
    for hospital in hospitals.values():
        hospital.adopts(". /opt/fedbrats/bin/activate")
    coordinator.environment = dict(bergen.environment)
    assert (here / "common" / "outdated.py").exists()

    # --- make it
    made = coordinator.types(
        f"fed-server init {FEDERATION} --address fed.example.org",
        *("--port", str(free_port()), *tiny_arguments),
        *("--set", "rounds.number=200", "--set", "server.gather_minutes=0"),
    )
    authority = re.findall(r"CA, to compare.*: ([\d ]+)$", made, re.MULTILINE)

    # --- enrol; each file goes from one machine to the other, the digits over the telephone
    keys = {}
    for hospital in hospitals.values():
        told = hospital.types(f"fed-client init {SITE} --name Oslo --data /data/brats")
        keys[hospital.name] = digits(told, "by telephone")
        assert len(keys[hospital.name]) == 1
        checked = hospital.types("fed-client check /data/brats")
        assert "5 subjects, 5 usable" in checked
        explained = hospital.types("fed-client policy explain /srv/fedbrats/site")
        assert "What may leave this site" in explained
        settings = hospital.path(SITE) / "site.yaml"  # as the page says, with so few subjects
        text = settings.read_text()
        assert "min_subjects: 5" in text
        settings.write_text(text.replace("min_subjects: 5", "min_subjects: 1"))

    def enrol(hospital: Person, line: str) -> None:
        sent = hospital.path(SITE) / "site.pub"
        (coordinator.machine / f"{hospital.name}.pub").write_bytes(sent.read_bytes())
        coordinator.words["Oslo"] = hospital.name
        told = coordinator.types(line)
        assert digits(told, "its key") == keys[hospital.name]
        assert digits(told, "your CA") == authority
        name = f"{hospital.name}.fedbrats.json"
        answer = coordinator.path(FEDERATION) / "invitations" / name
        (hospital.machine / name).write_bytes(answer.read_bytes())

    admit = f"fed-server admit {FEDERATION} Oslo.pub --name Oslo"
    for hospital in (oslo, bergen):
        enrol(hospital, admit)
    listed = coordinator.types(f"fed-server sites {FEDERATION}")
    assert "Oslo" in listed
    assert "Bergen" in listed

    # --- run it: Oslo says yes on a terminal, Bergen without one
    start = f"fed-server start {FEDERATION}"
    server = coordinator.leaves_running(start)
    join = f"fed-client join {SITE} --invitation Oslo.fedbrats.json"
    clients = {"Oslo": oslo.types_on_a_terminal(join, "yes")}
    sheet = clients["Oslo"].text().replace("\r", "")
    assert digits(sheet, "Its CA") == authority
    server.until(f"terms {terms_hash(sheet)}")
    for hospital in hospitals.values():
        hospital.words["HASH"] = terms_hash(sheet)
    clients["Bergen"] = bergen.leaves_running(f"{join} --accept HASH")
    eventually(lambda: rounds_done(coordinator) >= 1, "the first round", server.text)

    # --- a site is added while it runs
    enrol(tromso, admit)
    clients["Tromso"] = tromso.leaves_running(f"{join} --accept HASH")
    eventually(lambda: "update" in sent(tromso), "Tromso's first update", clients["Tromso"].text)

    # --- look and stop. Clients would go on trying; an upgrade needs them stopped
    again = f"fed-client join {SITE}"
    oslo.page.type(again)
    told = oslo.types(f"fed-client status {SITE}")
    assert "model update" in told
    departures = json.loads(oslo.types(f"fed-client status {SITE} --json"))["departures"]
    assert {"card", "update", "metrics"} <= {departure["kind"] for departure in departures}
    told = coordinator.types(f"fed-server status {FEDERATION}")
    assert "of 200 rounds done" in told
    coordinator.types(f"fed-server stop {FEDERATION}")
    assert server.wait() == 1, "it was stopped, so the training is not complete"
    before = rounds_done(coordinator)
    assert before < 100, "it was to be stopped on the way"
    for client in clients.values():
        os.kill(client.process.pid, signal.SIGINT)
        assert client.wait() == 0
        assert "Stopped. The same command joins again." in client.text()

    # --- the data-protection officer asks
    planned = oslo.types(f"fed-client privacy-plan {SITE} --epsilon 8")
    assert "sigma" in planned
    oslo.types(f"fed-client privacy-report {SITE}")
    page = (oslo.path(SITE) / "privacy-report" / "privacy-report.html").read_text()
    assert "without differential privacy" in page.lower()
    assert "unprotected" in oslo.types(f"fed-client privacy-ledger {SITE}")

    # --- upgrade: a module changes, one is gone; both sides share the installed programs here
    (published / "common" / "outdated.py").unlink()
    with (published / "client" / "app.py").open("a") as file:
        file.write("# a comment is another code hash too\n")
    commit(published)
    bergen.types("git -C fedbrats pull")
    bergen.types("git -C fedbrats clean -fdxq")
    bergen.types(INSTALL, *OFFLINE)
    assert not (here / "common" / "outdated.py").exists()

    # --- change it: fewer rounds, a new certificate, a backup
    settings = coordinator.path(FEDERATION) / "federation.yaml"
    text = settings.read_text()
    assert text.count("number: 200") == 1
    settings.write_text(text.replace("number: 200", f"number: {before + 3}"))
    renewed = coordinator.types(f"fed-server renew-certificate {FEDERATION}")
    assert "127.0.0.1" in renewed
    coordinator.types("tar -C /srv/fedbrats -czf federation-backup.tar.gz federation")
    kept = subprocess.run(
        ["tar", "-tzf", coordinator.machine / "federation-backup.tar.gz"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"federation/ca.key", "federation/enrolled.sqlite"} <= set(kept.split())
    server = coordinator.leaves_running(start)

    # --- everybody is asked anew, and nobody works for terms that he has not accepted
    for hospital in hospitals.values():
        clients[hospital.name] = hospital.leaves_running(again)
    for client in clients.values():
        client.until(f"rounds.number: 200 -> {before + 3}")
    assert rounds_done(coordinator) == before
    reviewed = oslo.types_on_a_terminal(f"fed-client review {SITE}", "yes")
    assert reviewed.wait() == 0
    reviewed.until("Accepted: ")
    changed = terms_hash(reviewed.text())
    server.until(f"terms {changed}")
    for hospital in (bergen, tromso):
        assert changed != hospital.words["HASH"]
        hospital.words["HASH"] = changed
        hospital.types(f"fed-client review {SITE} --accept HASH")

    # --- to the end
    assert server.wait() == 0, server.text()
    for client in clients.values():
        assert client.wait() == 0, client.text()
        assert "Training complete" in client.text()
    assert f"Training complete: {before + 3} rounds." in server.text()

    # --- afterwards: a new key for Bergen, Tromso leaves
    bergen.types(f"fed-client rotate-key {SITE}")
    old, keys["Bergen"] = keys["Bergen"], digits(_public(bergen), "by telephone")
    assert keys["Bergen"] != old
    enrol(bergen, f"{admit} --replace")
    left = tromso.types(f"fed-client leave {SITE}")
    assert "model update" in left
    assert not (tromso.path(SITE) / "accepted.json").exists()
    coordinator.words["Oslo"] = "Tromso"
    coordinator.types(f"fed-server revoke {FEDERATION} Oslo")
    listed = coordinator.types(f"fed-server sites {FEDERATION}")
    states = dict(re.findall(r"\| (\w+) +\| (enrolled|revoked)", listed))
    assert states == {"Oslo": "enrolled", "Bergen": "enrolled", "Tromso": "revoked"}
    coordinator.types(f"fed-server export {FEDERATION} model")
    card = json.loads((coordinator.machine / "model" / "model-card.json").read_text())
    # nobody has changed `show_name`, and the card is for whoever gets the model
    assert [site["site"] for site in card["sites"]] == [f"another site ({n})" for n in (1, 2, 3)]
    assert set(card["metrics"]) <= {site["site"] for site in card["sites"]}
    assert card["metrics"], "with so few subjects too, as the page says"
    assert len(card["terms"]) == 2
    coordinator.types(f"fed-server status {FEDERATION}")  # exit code 0: complete

    for name, page in pages.items():
        assert page.typed == page.lines, f"docs/{name}: nobody typed these"


def _public(hospital: Person) -> str:
    """The digits of the key that is there, as `rotate-key` printed them."""
    from common.keys import read_public_key, telephone_number

    key = read_public_key(hospital.path(SITE) / "site.pub").key
    return f"  by telephone     {telephone_number(key)}"


def said_by(*packages: str) -> set[str]:
    """Every text in these packages' code; implicitly joined ones as one."""
    texts = set()
    for package in packages:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.add(node.value)
    return texts


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_quote_what_the_programs_say(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quoted) >= 7
    texts = said_by("client", "common", "server", "sites")
    assert [q for q in quoted if not any(q in said for said in texts)] == []


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_name_files_settings_and_folders_that_exist(name):
    from client.hospital import HospitalFolder
    from common.config import FederationConfig

    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    for path in re.findall(r"`(deploy/[\w.-]+)`", text):
        assert (ROOT / path).is_file(), path
    sections = {key: type(value) for key, value in FederationConfig()}
    for section, key in re.findall(r"`(rounds|server|training)\.(\w+)`", text):
        assert key in sections[section].model_fields, f"{section}.{key}"
    if name == "hospital.md":
        folder = HospitalFolder(Path())
        names = [name for name, of in vars(HospitalFolder).items() if isinstance(of, property)]
        known = {str(getattr(folder, name)) for name in names}
        known |= {str(folder.audit.path), str(folder.audit.anchor)}
        listed = text.split("## Where it lies")[1].split("|")[0]
        for entry in re.findall(r"`([\w.]+)/?`", listed):
            assert entry in known, entry


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_short_and_all_its_commands_are_in_blocks_that_run(name):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 125
    kinds = re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]
    assert set(kinds) <= {"sh", "text"}
    assert sum(line.startswith(("fed-server", "fed-client")) for line in shell_lines(text)) >= 7
    outside = re.sub(r"^```sh\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"^```text\n(.*?)^```$", outside, re.MULTILINE | re.DOTALL):
        assert "fed-" not in block, "a command that no test runs"
