"""What a workstation needs: reading, folding, quantizing. Imports torch; a device never does."""

import logging

# torchao, which transformers imports where it is installed, warns about GPU kernels that nothing here needs
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
