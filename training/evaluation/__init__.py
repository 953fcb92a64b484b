"""How faithful inversion models are: the paper's tables and figures (Sec. 4, Appendices A to C), one suite each."""
