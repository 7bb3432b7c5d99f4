"""The commands with which a hospital makes and changes its key pair: `fed-client init`, `rotate-key`.

Nothing is sent: the hospital mails `site.pub` by itself. Heavy imports happen inside the commands.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.console import failing_in_words, printable, start_logging

if TYPE_CHECKING:
    from client.hospital import HospitalFolder


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder to make.")],
    name: Annotated[str, typer.Option(help="What the site is to be called, for example Oslo.")],
    data: Annotated[Path, typer.Option(help="Folder with the subjects; only ever read.")],
) -> None:
    """Make this hospital's folder: a key pair of its own and its settings.

    Exit code 0: made. 1: it could not be, or DIR is one already. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.hospital import init_hospital
        from client.site_config import load_site_config
        from common.site_names import BadName, site_name

        try:
            site_name(name)
        except BadName as error:
            raise typer.BadParameter(str(error), param_hint="--name") from None
        if not data.is_dir():
            raise typer.BadParameter(f"{data} is no folder.", param_hint="--data")
        made = init_hospital(folder, name, data)
        print(f"{name}: made in {folder}. Settings: {made.config}")
        ledger = load_site_config(made.config).privacy_ledger.resolve()
        if ledger.exists():
            print(f"Privacy ledger of all folders beside it (back it up): {ledger}")
        _print_key(made)
        print(f"Send {made.public_key} to the coordinator and compare the digits by telephone.")
        print(f"{made.private_key} is secret: it stays here, also the coordinator never needs it.")
        print("Then, with the invitation that the coordinator sends back:")
        print(f"  fed-client join {folder} --invitation FILE")


def rotate_key(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="This hospital's folder.")],
) -> None:
    """Make a new key pair, for example when the old key may have been seen by others.

    Exit code 0: made. 1: it could not be; the old pair stays. 2: wrong usage.
    """
    start_logging()
    with _failing():
        from client.hospital import HospitalFolder
        from client.hospital import rotate_key as rotate
        from common.keys import read_public_key

        made = HospitalFolder(folder)
        old = rotate(made)
        name = read_public_key(made.public_key).comment
        kept = f"the old private key is kept as {old}" if old else "there was no old private key"
        print(f"New key pair in {folder}; {kept}.")
        _print_key(made)
        print(f"Send {made.public_key} to the coordinator, who types:")
        print(f"  fed-server admit DIR SITE.pub --name {printable(name)} --replace")
        print("Until then the coordinator does not know this site. Then, with the new invitation:")
        print(f"  fed-client join {folder} --invitation FILE")


def _print_key(folder: HospitalFolder) -> None:
    from common.keys import fingerprint, read_public_key, telephone_number

    print(folder.public_key.read_text(encoding="utf-8"), end="")
    key = read_public_key(folder.public_key).key
    print(f"  by telephone     {telephone_number(key)}")
    print(f"                   {fingerprint(key)}")


def _failing() -> AbstractContextManager[None]:
    return failing_in_words("fed-client", _foreseen)


def _foreseen() -> tuple[type[Exception], ...]:
    from client.hospital import HospitalError
    from common.audit_log import LogError
    from common.files import AlreadyInUse
    from common.keys import BadKey
    from common.site_names import BadName

    return (AlreadyInUse, BadKey, BadName, HospitalError, LogError)
