from seqzoo.kernels.ssm_kernel.op import ssm_kernel as ssm_kernel
