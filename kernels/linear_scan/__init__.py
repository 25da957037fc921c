from seqzoo.kernels.linear_scan.op import linear_scan as linear_scan
