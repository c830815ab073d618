"""Forward noising: processes, time grids, the noise grid."""
