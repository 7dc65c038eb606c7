"""`python -m gateway_svc`: the text tier, between users and the scheduler."""

from __future__ import annotations

from gateway_svc.config import GatewaySettings
from pagoda import logs


def main() -> None:
    """Read the configuration and serve."""
    settings = GatewaySettings.load()
    settings.check()
    logs.setup("gateway", settings.log_level)
    # Imported late: several processes share metrics through files, which must be decided before the import.
    if settings.processes > 1:
        from gateway_svc import processes

        processes.run(settings)
    else:
        from gateway_svc import server

        server.run(settings)


if __name__ == "__main__":
    main()
