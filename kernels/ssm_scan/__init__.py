from seqzoo.kernels.ssm_scan.op import ssm_scan as ssm_scan
