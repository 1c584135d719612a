"""The network in training and the reference it may not drift from, whichever way it is trained."""

from training.loop.full_policy import FullPolicy
from training.loop.lora_policy import LoraPolicy

Policy = LoraPolicy | FullPolicy
