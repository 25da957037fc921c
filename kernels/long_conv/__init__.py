from seqzoo.kernels.long_conv.op import long_conv as long_conv
