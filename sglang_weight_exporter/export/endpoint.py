# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Keeps the endpoint open: binds it, has each web configuration in force, and says where it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Mapping

from sglang_weight_exporter import __version__
from sglang_weight_exporter.export.authenticator import Authenticator
from sglang_weight_exporter.export.prometheus import Exposition
from sglang_weight_exporter.export.server import (
    EndpointError,
    MetricsApp,
    Server,
    bind,
    configure,
    url,
)
from sglang_weight_exporter.export.web_configuration import (
    WebConfigurationError,
    WebConfigurationSource,
)
from sglang_weight_exporter.records.endpoint import ExporterEndpoint
from sglang_weight_exporter.settings import Settings
from sglang_weight_exporter.store.reader import write_endpoint
from sglang_weight_exporter.store.runtime_dir import RuntimeDir

logger = logging.getLogger("sglang_weight_exporter")

#: Between two tries to open the endpoint.
RETRY_SECONDS = 5.0

#: Between two checks of the web configuration and its certificates.
CHECK_SECONDS = 1.0

#: An exporter whose directory was removed finds out and leaves the port within this time.
PREDECESSOR_SECONDS = 2.0


class Endpoint:
    """Where the metrics are served, from the start of the process to its end."""

    def __init__(
        self,
        runtime_dir: RuntimeDir,
        settings: Settings,
        environ: Mapping[str, str],
        exposition: Exposition,
    ) -> None:
        self._runtime_dir = runtime_dir
        self._settings = settings
        self._authenticator = Authenticator()
        self._application = MetricsApp(exposition, self._authenticator)
        self._web = WebConfigurationSource(settings, environ)
        self._started_at = time.time()
        self._logged = ""
        self._announce(None, "")

    def is_ours(self, record: ExporterEndpoint) -> bool:
        """Whether it is what this process has said of itself."""
        return (record.pid, record.started_at) == (os.getpid(), self._started_at)

    async def serve(self) -> None:
        """Serve until the task that runs this is cancelled."""
        predecessor_may_leave = True
        while True:
            try:
                configuration = self._web.read()
                listener = bind(self._settings)
            except (EndpointError, WebConfigurationError) as error:
                if predecessor_may_leave:
                    predecessor_may_leave = False
                    await asyncio.sleep(PREDECESSOR_SECONDS)
                    continue
                without = " No metrics are served until that changes."
                self._announce(None, f"{error}{without * isinstance(error, WebConfigurationError)}")
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self._authenticator.use(configuration)
            self._announce(url(self._settings, tls=self._authenticator.tls is not None), "")
            config = configure(self._application, self._authenticator)
            server = asyncio.create_task(Server(config, listener).run())
            following = asyncio.create_task(self._follow())
            try:
                done, _ = await asyncio.wait(
                    [server, following], return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
            finally:
                following.cancel()
                server.cancel()
                await asyncio.gather(server, following, return_exceptions=True)
                listener.close()

    async def _follow(self) -> None:
        """Have each change of the web configuration and its certificates in force."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if not await asyncio.to_thread(self._web.has_changed):
                continue
            try:
                configuration = await asyncio.to_thread(self._web.read)
                if opened := self._authenticator.configuration.opens(configuration):
                    raise WebConfigurationError(
                        f"The web configuration has changed and has {opened} no longer, which is "
                        "not left while this process runs: end it, and the next one does."
                    )
                self._authenticator.use(configuration)
                logger.info("The web configuration has changed and was read again.")
                problem = ""
            except WebConfigurationError as error:
                problem = f"{error} What was read before stays in force."
            self._announce(url(self._settings, tls=self._authenticator.tls is not None), problem)

    def _announce(self, address: str | None, problem: str) -> None:
        """Say where the metrics are, or why they are not: in the log once, and for ``status``."""
        line = problem or (address and f"metrics are at {address}") or ""
        if line and line != self._logged:
            logger.log(logging.WARNING if problem else logging.INFO, line)
        self._logged = line
        record = ExporterEndpoint(
            pid=os.getpid(),
            started_at=self._started_at,
            version=__version__,
            url=address,
            problem=problem,
        )
        with contextlib.suppress(OSError):  # A full disk: `status` knows less, nothing else does.
            write_endpoint(self._runtime_dir, record)
