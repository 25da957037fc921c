from seqzoo.kernels.delta_rule.op import delta_rule as delta_rule
