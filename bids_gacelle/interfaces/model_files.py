"""Signal models from files of the user: read once, known in every process of the run."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from bids_gacelle.bids import names
from bids_gacelle.bids.series import Series
from bids_gacelle.engine import EngineError, SignalModel, use_models
from bids_gacelle.engine.models.checks import check_declaration, check_signal, probe_scheme
from bids_gacelle.errors import InputError

Models = tuple[type[SignalModel], ...]

_origins: dict[str, tuple[str, str]] = {}
"""Per model known from a file: the file's path, and the SHA-256 of its text."""


def load_model_files(paths: Iterable[Path]) -> list[list[str]]:
    """Read files, make their models known, and return [path, text] of each.

    What is fitted, hashed and kept with the run is this text, also if a file changes meanwhile.

    Raises
    ------
    InputError
        A file cannot be read or run, or a model of it cannot be used; says which line.
    """
    found = []
    for path in dict.fromkeys(paths):
        try:
            found.append([str(path), path.read_bytes().decode("utf-8-sig")])
        except OSError as error:
            raise InputError(f"Cannot read the model file {path}: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise InputError(f"The model file {path} is not UTF-8 text: {error}.") from error
    use_model_files(found)
    return found


def use_model_files(files: Iterable[Sequence[str]]) -> None:
    """Make the models of these files known by name, in place of those of an earlier call.

    Parameters
    ----------
    files
        As `load_model_files` gives them.

    Raises
    ------
    InputError
        A file cannot be run, defines no model, or one that cannot be used; says which line.
    """
    models: list[type[SignalModel]] = []
    origins = {}
    for path, text in files:
        digest = hashlib.sha256(text.encode()).hexdigest()
        for model in _load(path, text):
            models.append(model)
            origins[model.name] = path, digest
            try:
                use_models(models)
            except EngineError as error:
                raise _refusal(path, _line_of(model, text), str(error)) from error
    use_models(models)
    _origins.clear()
    _origins.update(origins)


def model_file(name: str) -> tuple[str, str] | None:
    """Path and SHA-256 of the file that a model came from, None if it is installed."""
    return _origins.get(name)


@lru_cache(maxsize=16)
def _load(path: str, text: str) -> Models:
    """Run a file and check the models that it defines; nodes of one process do it once."""
    # The module stays known under a name of its own: compilers and data classes look it up.
    module = ModuleType("_model_file_" + hashlib.sha256((path + text).encode()).hexdigest()[:16])
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise _refusal(path, error.lineno, f"{error.msg} (Python syntax)") from error
    except (Exception, SystemExit) as error:
        raise _refusal(path, _line_in(path, error), _reason(error)) from error
    models = tuple(
        dict.fromkeys(
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, SignalModel)
            and value.__module__ == module.__name__
            and not inspect.isabstract(value)
        )
    )
    if not models:
        raise InputError(
            f"The model file {path} defines no signal model; write a function with @signal_model "
            "above it, or a subclass of SignalModel that has a signal method."
        )
    for model in models:
        try:
            _check(model)
        except EngineError as error:
            line = _line_in(path, error) or _line_of(model, text)
            raise _refusal(path, line, str(error)) from error
    return models


def _check(model: type[SignalModel]) -> None:
    """Check what a model declares, what its maps would be called, and the signal it gives."""
    check_declaration(model)
    series = Series(model.kind, "01", "", {}, ())
    try:
        paths = [names.quality_path(series, q, model=model.name) for q in ("nrmse", "chi2")]
        for parameter in (*model.parameters, *model.derived):
            paths.append(
                names.map_path(
                    series,
                    model=model.name,
                    parameter=parameter.name,
                    suffix=parameter.suffix,
                    datatype=model.datatype,
                )
            )
    except ValueError as error:
        raise EngineError(f"The maps of {model.name} cannot be named: {error}.") from error
    twice = [path.name for i, path in enumerate(paths) if path in paths[:i]]
    if twice:
        raise EngineError(f"Two maps of {model.name} would be called {twice[0]}.")
    try:
        tried = model(probe_scheme(model))
    except EngineError:
        return  # it wants an acquisition of a kind that only real data have
    except Exception as error:
        raise EngineError(f"{model.name} cannot be made: {_reason(error)}") from error
    check_signal(tried)


def _reason(error: BaseException) -> str:
    if isinstance(error, EngineError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error}. A model file can import packages that are installed, nothing beside it."
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _refusal(path: str, line: int | None, reason: str) -> InputError:
    where = f", line {line}" if line else ""
    return InputError(f"The model file {path}{where}: {reason.removesuffix('.')}.")


def _line_in(path: str, error: BaseException | None) -> int | None:
    """The innermost line of a file that an error, or what caused it, came from."""
    line = None
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == path:
                line = trace.tb_lineno
            trace = trace.tb_next
        error = error.__cause__
    return line


def _line_of(model: type[SignalModel], text: str) -> int | None:
    """The line that defines a model."""
    kinds = ast.ClassDef | ast.FunctionDef
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, kinds) and node.name == model.__name__:
            return node.lineno
    return None
