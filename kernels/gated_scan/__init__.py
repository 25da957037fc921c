from seqzoo.kernels.gated_scan.op import gated_scan as gated_scan
