"""The ops in plain torch: any device, any floating dtype, the reference of the kernels."""
