"""Configuration of every service: flag > environment variable > TOML file > default.

A service declares one frozen `ServiceSettings` subclass; its fields are its flags (`max_inflight` is
`--max-inflight`), its variables (`PAGODA_SCHEDULER_MAX_INFLIGHT`) and the keys of its section in the
TOML file named by `--config` or `PAGODA_CONFIG` (`[scheduler]`). An unknown key is an error.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self

from pydantic import Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

# One file may configure every service, so a section that none of them has is a typing error.
SECTIONS = frozenset({"gateway", "scheduler", "worker"})


class ServiceSettings(BaseSettings):
    """Fields that every service has. Subclasses set `section`."""

    section: ClassVar[str]
    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    token: str = Field("", description="Shared secret that callers present as a bearer token.")
    insecure: bool = Field(False, description="Allow an address other than loopback without a token.")
    metrics_alias: Literal["none", "vllm"] = Field(
        "none", description="vllm: publish the metrics that vLLM has under its names, too."
    )
    otlp_traces_endpoint: str = Field(
        "", description="URL that traces are sent to, as http://127.0.0.1:4317; empty: no traces."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )

    @classmethod
    def load(cls, argv: list[str] | None = None, **defaults: Any) -> Self:
        """Read flags, environment and file. Prints what is wrong and exits with 2 on bad input."""
        argv = list(sys.argv[1:] if argv is None else argv)
        config, argv = _take_option(argv, "--config", os.environ.get("PAGODA_CONFIG"))
        print_config = "--print-config" in argv
        argv = [a for a in argv if a != "--print-config"]
        known = set(cls.model_fields)
        values = dict(defaults)
        if config:
            values.update(_read_section(Path(config), cls.section, known))
        if "PAGODA_TOKEN" in os.environ:
            values["token"] = os.environ["PAGODA_TOKEN"]
        values.update(_read_environment(f"PAGODA_{cls.section.upper()}_", known))
        try:
            settings = cls(**{**values, **cls._read_flags(argv)})
        except ValidationError as error:
            _fail("\n".join(f"{_flag(e['loc'])}: {e['msg']}" for e in error.errors()))
        if print_config:
            print(settings.model_dump_json(indent=2, exclude={"token"}))
            raise SystemExit(0)
        return settings

    @classmethod
    def _read_flags(cls, argv: list[str]) -> dict[str, Any]:
        parser = argparse.ArgumentParser(
            prog=f"python -m {cls.__module__.split('.')[0]}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
            epilog=f"--config FILE reads [{cls.section}] of a TOML file; --print-config shows what counts "
            f"and exits. Every flag is also a variable PAGODA_{cls.section.upper()}_NAME. "
            "Flags beat variables, variables beat the file.",
        )
        source = CliSettingsSource[Any](
            cls,
            root_parser=parser,
            cli_kebab_case=True,
            cli_implicit_flags="dual",
            cli_hide_none_type=True,
            cli_avoid_json=True,
        )
        return source(args=argv)()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what `load` gathered counts, so that precedence is written in one place."""
        return (init_settings,)


def check_listen(name: str, address: str, token: str, insecure: bool) -> None:
    """Refuse to serve strangers by accident.

    Raises:
        SystemExit: `address` (host:port or host) is not loopback, and there is no token and no `--insecure`.
    """
    if not (_is_local(address) or token or insecure):
        _fail(
            f"{name}: {address} can be reached from other machines. "
            "Set a token (--token or PAGODA_TOKEN), or allow it without one (--insecure)."
        )


def _is_local(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    if address.startswith("["):
        host = address[1:].split("]", 1)[0]
    else:  # more than one colon and no brackets is an IPv6 address without a port
        host = address.split(":", 1)[0] if address.count(":") == 1 else address
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _flag(location: tuple[Any, ...]) -> str:
    return "--" + ".".join(str(part) for part in location).replace("_", "-") if location else "configuration"


def _take_option(argv: list[str], name: str, default: str | None) -> tuple[str | None, list[str]]:
    for i, arg in enumerate(argv):
        if arg == name:
            if i + 1 == len(argv):
                _fail(f"{name} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if arg.startswith(name + "="):
            return arg.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return default, argv


def _read_section(path: Path, section: str, known: set[str]) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        _fail(f"--config: cannot read {path}: {error.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        _fail(f"--config: {path}: {error}")
    for name, content in document.items():
        if name not in SECTIONS | {section} or not isinstance(content, dict):
            _fail(f"--config: {path}: {name!r} is not a section; there are {', '.join(sorted(SECTIONS))}")
    values = {key.replace("-", "_"): value for key, value in document.get(section, {}).items()}
    for key in values:
        if key not in known:
            _fail(f"--config: {path}: [{section}] has no setting {key!r}; --help lists them")
    return values


def _read_environment(prefix: str, known: set[str]) -> dict[str, str]:
    values = {k[len(prefix) :].lower(): v for k, v in os.environ.items() if k.startswith(prefix)}
    for key in values:
        if key not in known:
            _fail(f"{prefix}{key.upper()} is not a setting; --help lists them")
    return values
