def training_loss(model, scheduler, x0, t, noise):
    xt = scheduler.add_noise(x0, noise, t)
    return (model(xt, t).float() - noise).square().flatten(1).mean(1)
