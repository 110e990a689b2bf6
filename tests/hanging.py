"""When a process that a test waits for is taken to hang: before pyproject.toml's faulthandler_timeout ends the test."""

# None takes a tenth of it on two cores.
SECONDS = 600
