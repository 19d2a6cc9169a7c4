"""Python runs this before anything else where the folder is on its path.

diffusers imports these four where they are installed, for some three seconds, and what the tests' child processes do needs none
of them.
"""

import sys

sys.modules.update(dict.fromkeys(("accelerate", "peft", "torchao", "transformers")))
