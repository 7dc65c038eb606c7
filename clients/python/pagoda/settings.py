"""Configuration of every service: flag > environment variable > TOML file > default.

A service declares one frozen `ServiceSettings` subclass; its fields are its flags (`max_inflight` is
`--max-inflight`), its variables (`PAGODA_SCHEDULER_MAX_INFLIGHT`) and the keys of its section in the
TOML file named by `--config` or `PAGODA_CONFIG` (`[scheduler]`). An unknown key is an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict


class ServiceSettings(BaseSettings):
    """Fields that every service has. Subclasses set `section`."""

    section: ClassVar[str]
    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    token: str = Field("", description="Shared secret that callers present as a bearer token.")
    insecure: bool = Field(False, description="Allow an address other than loopback without a token.")
    log_level: str = Field("info", description="debug, info, warning or error.")

    @classmethod
    def load(cls, argv: list[str] | None = None, **defaults: Any) -> Self:
        """Read flags, environment and file. Prints what is wrong and exits with 2 on bad input."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config, argv = _take_option(argv, "--config", os.environ.get("PAGODA_CONFIG"))
        print_config = "--print-config" in argv
        argv = [a for a in argv if a != "--print-config"]
        prefix = f"PAGODA_{cls.section.upper()}_"
        values = dict(defaults)
        if config:
            values.update(_read_section(Path(config), cls.section))
        values.update(_read_environment(prefix, set(cls.model_fields)))
        if "PAGODA_TOKEN" in os.environ:
            values.setdefault("token", os.environ["PAGODA_TOKEN"])
        source = CliSettingsSource[Any](
            cls,
            cli_prog_name=f"python -m {cls.__module__.split('.')[0]}",
            cli_kebab_case=True,
            cli_implicit_flags="toggle",
            cli_hide_none_type=True,
            cli_avoid_json=True,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        try:
            flags = source(args=argv)()
            settings = cls(**{**values, **flags})
        except ValidationError as error:
            _fail("\n".join(f"{_flag(e['loc'])}: {e['msg']}" for e in error.errors()))
        if print_config:
            print(settings.model_dump_json(indent=2, exclude={"token"}))
            raise SystemExit(0)
        return settings

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, **_: Any) -> tuple[Any, ...]:
        """Only what `load` gathered counts, so that precedence is written in one place."""
        return (init_settings,)


def check_listen(name: str, address: str, token: str, insecure: bool) -> None:
    """Refuse to serve strangers by accident.

    Raises:
        SystemExit: `address` (host:port or host) is not loopback, and there is neither a token nor `--insecure`.
    """
    host = address.rsplit(":", 1)[0].strip("[]") if ":" in address else address
    loopback = host in ("localhost", "::1") or host.startswith("127.") or address.startswith("unix:")
    if not (loopback or token or insecure):
        _fail(
            f"{name}: {address} can be reached from other machines. "
            "Set a token (--token or PAGODA_TOKEN), or allow it without one (--insecure)."
        )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _flag(location: tuple[Any, ...]) -> str:
    return "--" + ".".join(str(part) for part in location).replace("_", "-") if location else "configuration"


def _take_option(argv: list[str], name: str, default: str | None) -> tuple[str | None, list[str]]:
    for i, arg in enumerate(argv):
        if arg == name and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return default, argv


def _read_section(path: Path, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        _fail(f"--config: cannot read {path}: {error.strerror}")
    except tomllib.TOMLDecodeError as error:
        _fail(f"--config: {path}: {error}")
    values = document.get(section, {})
    return {key.replace("-", "_"): value for key, value in values.items()}


def _read_environment(prefix: str, known: set[str]) -> dict[str, str]:
    values = {k[len(prefix) :].lower(): v for k, v in os.environ.items() if k.startswith(prefix)}
    for key in values:
        if key not in known:
            _fail(f"{prefix}{key.upper()} is not a setting; --help lists them")
    return values
