from seqzoo.kernels.attention.op import attention as attention
