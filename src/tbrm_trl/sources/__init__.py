"""Where trajectories come from: rollouts, logged rows, the replay buffer, files."""
