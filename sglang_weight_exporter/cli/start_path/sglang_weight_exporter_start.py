# SPDX-FileCopyrightText: The sglang_weight_exporter authors
# SPDX-License-Identifier: Apache-2.0
"""Arms the hooks in a Python that has this directory in PYTHONPATH.

Whoever comes first calls it: the ``sitecustomize`` here; the ``usercustomize``, where another
``sitecustomize`` is in front of it; or the OpenTelemetry operator's, which runs entry points.
"""

import os
import sys


def arm() -> None:
    """Does it once: the directory leaves the module path."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120
    # Nobody else is to find this directory, the other sitecustomize's importer first of all.
    sys.path[:] = [path for path in sys.path if path != here]
    if os.environ.get("PYTHONPATH") == here + os.pathsep:
        _drop_the_empty_entry(here)
    word = os.environ.get("SGLANG_WEIGHT_EXPORTER_DISABLED", "").strip().lower()
    if word in ("1", "true", "yes", "on"):
        return
    # The package may lie among the packages of another environment. From there it is imported,
    # and nothing else: a second torch or a stray optional dependency must not be found.
    parent = os.path.dirname(os.path.dirname(os.path.dirname(here)))  # noqa: PTH120
    sys.path.append(parent)
    try:
        from sglang_weight_exporter import bootstrap

        bootstrap.arm()
    except Exception as error:
        sys.stderr.write("sglang_weight_exporter: not active ({!r}).\n".format(error))  # noqa: UP032
    finally:
        sys.path.remove(parent)


def _drop_the_empty_entry(here: str) -> None:
    """What Kustomize leaves when it puts a path in front of no path, and what Python takes for the
    working directory: nobody asked for modules from there."""
    os.environ["PYTHONPATH"] = here
    try:  # noqa: SIM105
        sys.path.remove(os.getcwd())  # noqa: PTH109
    except (OSError, ValueError):  # There is none: it was removed, or Python found none.
        pass


def run_the_other(name: str) -> None:
    """Import the module of this name that would be there without this directory."""
    ours = sys.modules.pop(name, None)
    try:
        __import__(name)
    except ImportError as error:
        if error.name != name:
            raise
    finally:
        if ours is not None:  # Python's import of that very file looks for it there.
            sys.modules.setdefault(name, ours)
