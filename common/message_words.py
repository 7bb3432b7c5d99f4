"""The names, codes and words in messages, for who handles messages and never a tensor.

Without torch: `fed-client join` runs for weeks, and its worker alone needs it.
"""

from __future__ import annotations

BLOCK = "weights"  # the one array of a message that carries weights
STYPE = "safetensors"
NONCE = "nonce"  # that a server process puts into every record it sends; it says nothing
MOST_SUBJECTS = 10**7
BUDGET_SPENT = 1001  # code of an error reply, beyond Flower's own: no failure, the site rests
POLICY_REFUSED = 1002  # the same where a rule of the site's own policy refuses: others go on
EXACT, NOISED, WITHHELD = "exact", "noised", "withheld"  # how metrics are released
FP32, FP16_CHANGE = "fp32", "fp16-change"  # how a block's tensors are written (`common.wire`)
