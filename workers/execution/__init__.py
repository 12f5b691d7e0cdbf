"""Running plans: the state of the batch on the device, KV tensors, sampling, the runner."""
