# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom while somebody tries passwords."""

from __future__ import annotations

import asyncio
import base64

import pytest

from sglang_weight_exporter.export import authenticator
from sglang_weight_exporter.export.authenticator import Authenticator, BusyError
from sglang_weight_exporter.export.web_configuration import WebConfiguration

USERS = {"prometheus": "$2y$04$of-prometheus", "grafana": "$2y$04$of-grafana"}


def credentials(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


RIGHT = credentials("prometheus", "right")


class Checks:
    """Stands for bcrypt: each check ends when it is let go, and finds `right` to be right."""

    def __init__(self) -> None:
        self.checked: list[bytes] = []

    def __call__(self, password: bytes, hashed: str) -> bool:
        self.checked.append(password)
        return password == b"right"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    found = Checks()
    monkeypatch.setattr(authenticator, "_matches", found)
    return found


def access() -> Authenticator:
    made = Authenticator()
    made.use(WebConfiguration(users=USERS))
    return made


async def tries(made: Authenticator, client: str, number: int) -> list[asyncio.Task[bool]]:
    """So many wrong passwords of one client, all of which wait."""
    tasks = [
        asyncio.create_task(made.admits(credentials("prometheus", f"wrong{each}"), client))
        for each in range(number)
    ]
    await asyncio.sleep(0)
    return tasks


def test_another_client_waits_for_one_check_of_the_attack_s(checks: Checks) -> None:
    async def run() -> int:
        made = access()
        attack = await tries(made, "192.0.2.1", 16)
        assert await made.admits(RIGHT, "192.0.2.2")
        done = len(checks.checked)
        await asyncio.gather(*attack)
        return done

    # Its own, the one under way when it came, and the one that a turn may have begun before it.
    assert asyncio.run(run()) <= 3


def test_who_waits_is_bounded(checks: Checks) -> None:
    async def run() -> None:
        made = access()
        attack = await tries(made, "2001:db8::1", 100)
        refused = [task for task in attack if task.done() and task.exception()]
        assert len(refused) > 80
        # A network of IPv6 is one client, and another one is not.
        with pytest.raises(BusyError):
            await made.admits(RIGHT, "2001:db8::2")
        assert await made.admits(RIGHT, "2001:db8:0:1::2")
        await asyncio.gather(*attack, return_exceptions=True)
        assert len(checks.checked) < 20

    asyncio.run(run())


def test_clients_that_wait_are_bounded(checks: Checks) -> None:
    async def run() -> int:
        made = access()
        attack = [
            asyncio.create_task(made.admits(credentials("prometheus", "wrong"), f"192.0.2.{each}"))
            for each in range(200)
        ]
        results = await asyncio.gather(*attack, return_exceptions=True)
        return sum(isinstance(each, BusyError) for each in results)

    assert asyncio.run(run()) > 100


def test_who_goes_away_keeps_no_turn(checks: Checks) -> None:
    async def run() -> None:
        made = access()
        for task in await tries(made, "192.0.2.1", 16):
            task.cancel()
        assert await made.admits(RIGHT, "192.0.2.2")
        assert await made.admits(credentials("grafana", "right"), "192.0.2.1")

    asyncio.run(run())


def test_what_was_verified_stays_with_its_hash(checks: Checks) -> None:
    async def run() -> None:
        made = access()
        assert await made.admits(RIGHT, "192.0.2.2")
        made.use(WebConfiguration(users={**USERS, "another": "$2y$04$x"}, burst=1, interval=1.0))
        attack = await tries(made, "192.0.2.2", 16)
        before = list(checks.checked)
        assert await made.admits(RIGHT, "192.0.2.2")  # It waits for nobody.
        assert [each for each in checks.checked if each not in before] == []
        made.use(WebConfiguration(users={**USERS, "prometheus": "$2y$04$another"}))
        await asyncio.gather(*attack)
        assert await made.admits(RIGHT, "192.0.2.2")
        assert checks.checked.count(b"right") == 2

    asyncio.run(run())
