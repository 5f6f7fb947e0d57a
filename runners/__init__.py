"""The programs that train, evaluate, record, plan and ask; and the loop and the files that they share."""

import os

# Before torch is imported anywhere. Its threads wait for their next operator by spinning, unless told otherwise, on
# cores that the environments' processes, the renderer and the other half of an update have work for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
