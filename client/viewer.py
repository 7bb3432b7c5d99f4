"""The viewer's page and what it asks for: scans and labels as NIfTI, volumes, upload, segmentation.

An ASGI application without any guard of its own: `common.local_page.serving` keeps everybody out who
does not hold the token. What is shown is `client.viewing`; the page itself lies in `client/web`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from client.viewing import MOST_BYTES, Busy, Unusable, Viewing, in_words
from common.brats import MODALITIES
from sites.subject import SEGMENTATION, role_of

WEB = Path(__file__).parent / "web"


def viewer_app(viewing: Viewing) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.mount("/web", StaticFiles(directory=WEB))

    @app.get("/")
    def page() -> Response:
        return FileResponse(WEB / "viewer.html")

    @app.get("/favicon.ico")
    def icon() -> Response:
        return Response(status_code=204)

    @app.get("/api/state")
    def state() -> Response:
        return JSONResponse(viewing.state())

    @app.get("/api/volumes/{name}.nii")
    def volume(name: str) -> Response:
        content = viewing.volume(name)
        if content is None:
            return _problem(404, f"There is no {name if name in MODALITIES else 'such volume'}.")
        return Response(content, media_type="application/octet-stream")

    @app.get("/api/segmentation.nii.gz")
    def segmentation() -> Response:
        found = viewing.segmentation_file()
        if found is None:
            return _problem(404, "There is no segmentation yet.")
        name, content = found
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(content, media_type="application/gzip", headers=headers)

    @app.post("/api/roles")
    async def roles(names: list[str]) -> Response:
        """Which modality each of some files' names speaks of, null where none."""
        parsed = [role_of(name, "") for name in names]
        return JSONResponse([p[1] if p and p[1] != SEGMENTATION else None for p in parsed])

    @app.put("/api/upload/{modality}")
    async def upload(modality: str, request: Request) -> Response:
        if modality not in viewing.needed:
            return _problem(404, "The model reads no such modality.")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > MOST_BYTES:
            return _too_large()
        try:
            file, path = viewing.new_file()
        except Busy:
            return _busy()
        except OSError as error:
            return _not_kept(error)
        try:
            with file:
                size = 0
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > MOST_BYTES:
                        return _too_large()
                    file.write(chunk)
            about = await run_in_threadpool(viewing.take, modality, path)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it
        except Busy:
            return _busy()
        except Unusable as refused:
            return _unusable(refused)
        except OSError as error:
            return _not_kept(error)
        finally:
            path.unlink(missing_ok=True)
        return JSONResponse(about)

    @app.delete("/api/upload")
    def forget() -> Response:
        try:
            viewing.forget_uploads()
        except Busy:
            return _busy()
        return Response(status_code=204)

    @app.post("/api/segment")
    def segment() -> Response:
        if not viewing.needed:
            return _problem(404, "The viewer was started without a model.")
        try:
            viewing.segment_uploads()
        except Busy:
            return _busy()
        except Unusable as refused:
            return _unusable(refused)
        return Response(status_code=202)

    return app


def _problems(status: int, problems: Iterable[dict[str, Any]]) -> Response:
    return JSONResponse({"problems": list(problems)}, status)


def _problem(status: int, what: str) -> Response:
    return _problems(status, [{"file": "", "severity": "error", "what": what, "remedy": ""}])


def _unusable(refused: Unusable) -> Response:
    return _problems(422, (in_words(finding) for finding in refused.findings))


def _busy() -> Response:
    return _problem(409, "A segmentation is running. Wait for it; one is made at a time.")


def _not_kept(error: OSError) -> Response:
    return _problem(507, f"It could not be kept ({error.strerror}). Free disk space.")


def _too_large() -> Response:
    return _problem(413, f"The file is larger than {MOST_BYTES // 10**6} MB, which no scan is.")
