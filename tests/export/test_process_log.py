# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""What a log may say and how often; how records come through a pipe."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from sglang_weight_exporter.process_log import Message, PipeHandler, RateLimitFilter, read_messages


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def complain(logger: logging.Logger, number: int = 0) -> None:
    logger.warning("The collector refused %d.", number)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def said(clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.INFO)
    with caplog.filtering(RateLimitFilter(clock)):
        yield caplog


def test_what_is_said_over_and_over_is_said_a_few_times_and_counted(
    clock: Clock, said: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("test")
    for number in range(1000):
        complain(logger, number)
    assert said.messages == [f"The collector refused {number}." for number in range(5)]
    logger.warning("Something else.")
    clock.now += 60
    complain(logger, 1000)
    assert said.messages[5:] == [
        "Something else.",
        "The collector refused 1000. (995 more like this were not logged.)",
    ]


def test_an_outage_each_hour_is_said_each_hour(
    clock: Clock, said: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        complain(logging.getLogger("test"))
        clock.now += 3600
    assert said.messages == ["The collector refused 0."] * 20


def through_a_pipe(*records: tuple[int, str] | bytes) -> list[Message | None]:
    reader, writer = os.pipe()
    handler = PipeHandler(writer)
    for record in records:
        if isinstance(record, bytes):
            os.write(writer, record)
        else:
            level, text = record
            handler.emit(logging.LogRecord("test", level, __file__, 1, text, None, None))
    handler.say_goodbye()
    os.close(writer)
    with os.fdopen(reader, errors="replace") as lines:
        return list(read_messages(lines))


def test_records_come_whole_with_their_level() -> None:
    traceback = "Traceback:\n  line\nValueError: no"
    assert through_a_pipe((logging.ERROR, traceback), (logging.INFO, "Grüße \ud800")) == [
        Message(logging.ERROR, traceback),
        Message(logging.INFO, "Grüße \ud800"),
        None,
    ]


def test_a_record_too_long_to_come_whole_keeps_its_beginning_and_end() -> None:
    for character in "x\U0001f600":
        message, goodbye = through_a_pipe((logging.ERROR, f"begin{character * 10_000}end"))
        assert message is not None
        assert message.text.startswith("begin")
        assert message.text.endswith("end")
        assert len(message.text) > 300
        assert goodbye is None


def test_lines_that_are_no_records_are_one_message() -> None:
    crash = b"Fatal Python error: Aborted\n\xff\n[1, 2]\nnull\n{}\n"
    assert through_a_pipe(crash, (logging.INFO, "after")) == [
        Message(logging.WARNING, "Fatal Python error: Aborted\n\ufffd\n[1, 2]\nnull\n{}"),
        Message(logging.INFO, "after"),
        None,
    ]
