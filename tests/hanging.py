"""When a process that a test waits for is taken to hang."""

import os

# None takes a hundredth of it, nor a tenth on a busy machine or under a sanitizer: how long they take is not judged.
SECONDS = float(os.environ.get("KDFAST_HANGING_SECONDS", 1800))
