"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell without job control starts what it puts into the background with SIGINT ignored, and that is inherited: the
# processes under test could not be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
