from seqzoo.kernels.causal_conv.op import causal_conv as causal_conv
