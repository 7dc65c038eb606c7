"""The tensors tier: rows on the device, the model, sampling. Does what each step says."""
