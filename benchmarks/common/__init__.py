"""What the benchmarks share. The tests use its tiny models, token trees and launchers too."""
