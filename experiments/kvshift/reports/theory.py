def report(workdir, cfg):
  raise NotImplementedError
