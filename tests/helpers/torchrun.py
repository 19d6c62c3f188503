"""torchrun, for the launcher: without its seconds of importing PyTorch."""
from torch.distributed.run import main

main()
