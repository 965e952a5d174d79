"""docker-compose.yml and the image, run by a container engine and judged from outside (`make test-containers`).

engine.py         a container engine that is at hand, and how it is spoken to
debian_engine.py  else one made of Debian's packages: as root, without a service manager, without a registry
stand_ins.py      where no registry is used: the images that the files name, made on the spot
name_server.py    answers "no such name" where containers reach no name server
project.py        the compose project: its files, ports, secrets and containers
image_checks.py   what the image holds and may do
stack_checks.py   what the running system does, seen from outside
report.py         one line for each check
"""
