"""From noise to latents: windows, timestep schedules, the solver, the cache and the denoising loop."""
