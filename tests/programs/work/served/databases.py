# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers of data: redis, memcached, postgres, mariadb, mosquitto."""

import os
import pwd
import re
import shutil
import subprocess
import time
from pathlib import Path

from base import HOST, Served, asked, is_


class Redis(Served):
    """A connection over TCP, one over a unix socket, a subscriber, and a transaction that stays open."""

    def start(self) -> None:
        self.run('redis-server', '--port', str(self.port), '--bind', HOST, '--unixsocket', 'redis.sock', '--save', '',
                 '--io-threads', '2')
        self.tcp, self.unix = self.connect((HOST, self.port)), self.connect('redis.sock')
        self.subscriber, self.transaction = self.connect((HOST, self.port)), self.connect('redis.sock')
        asked(self.subscriber, b'SUBSCRIBE news\r\n', len(b'*3\r\n$9\r\nsubscribe\r\n$4\r\nnews\r\n:1\r\n'))
        is_(asked(self.transaction, b'MULTI\r\n', 5), b'+OK\r\n')

    def use(self, number: int) -> None:
        is_(asked(self.tcp, b'INCR rounds\r\n', 4), b':%d\r\n' % number)
        is_(asked(self.unix, b'GET rounds\r\n', 7), b'$1\r\n%d\r\n' % number)
        is_(asked(self.unix, b'PUBLISH news %d\r\n' % number, 4), b':1\r\n')
        wanted = b'*3\r\n$7\r\nmessage\r\n$4\r\nnews\r\n$1\r\n%d\r\n' % number
        is_(asked(self.subscriber, b'', len(wanted)), wanted)
        is_(asked(self.transaction, b'INCR queued\r\n', 9), b'+QUEUED\r\n')


class Memcached(Served):

    def start(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        self.run('memcached', '-p', str(self.port), '-U', '0', '-l', HOST, '-t', '2', '-u', user)
        self.tcp = self.connect((HOST, self.port))

    def use(self, number: int) -> None:
        if number > 1:
            wanted = b'VALUE last 0 1\r\n%d\r\nEND\r\n' % (number - 1)
            is_(asked(self.tcp, b'get last\r\n', len(wanted)), wanted)
        is_(asked(self.tcp, b'set last 0 0 1\r\n%d\r\n' % number, 8), b'STORED\r\n')


class Postgres(Served):
    """A session in a transaction, and a new one in each round. The server does not run as root."""

    def start(self) -> None:
        [programs] = sorted(Path('/usr/lib/postgresql').glob('*/bin'))[-1:]
        self.programs, self.user = programs, pwd.getpwnam('postgres')
        Path('data').mkdir()
        os.chown('data', self.user.pw_uid, self.user.pw_gid)
        Path.cwd().chmod(0o755)
        self.drop = ['setpriv', f'--reuid={self.user.pw_uid}', f'--regid={self.user.pw_gid}', '--clear-groups']
        subprocess.run([*self.drop, programs / 'initdb', '-D', 'data', '-A', 'trust', '-N', '--no-instructions'],
                       stdout=subprocess.DEVNULL, check=True)
        self.run(*self.drop, str(programs / 'postgres'), '-D', 'data', '-p', str(self.port), '-c',
                 f'unix_socket_directories={Path.cwd()}/data', '-c', f'listen_addresses={HOST}')
        self.connect((HOST, self.port)).close()
        while self.once('select 1') != '1':
            is_(self.server.poll(), None)
            time.sleep(0.01)
        self.session = subprocess.Popen(self.client('data'), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        is_(self.ask('create table t(n int); begin; insert into t values (0); select count(*) from t;'), '1')

    def client(self, host: str) -> list[str]:
        return [str(self.programs / 'psql'), '-XqAt', '-U', 'postgres', '-p', str(self.port), '-h',
                str(Path(host).absolute()) if host == 'data' else host, 'postgres']

    def once(self, command: str) -> str:
        done = subprocess.run([*self.client(HOST), '-c', command], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def ask(self, commands: str) -> str:
        assert self.session.stdin
        assert self.session.stdout
        self.session.stdin.write(commands + '\n')
        self.session.stdin.flush()
        return self.session.stdout.readline().strip()

    def use(self, number: int) -> None:
        is_(self.ask(f'insert into t values ({number}); select count(*) from t;'), str(number + 1))
        is_(self.once('select count(*) from t'), '0')       # the transaction is still open
        if number == 5:
            is_(self.ask('commit; select count(*) from t;'), '6')
            is_(self.once('select count(*) from t'), '6')


class Mariadb(Served):
    """Two servers, one with io_uring and one without; a session with each in a transaction, over TCP and over a unix
    socket; and new sessions in each round, which have pages written to the disk."""

    def start(self) -> None:
        data = Path('uring').absolute()
        options = ['--no-defaults', '--user=root', '--innodb-log-file-size=4M', '--innodb-buffer-pool-size=8M']
        subprocess.run(['mariadb-install-db', *options, f'--datadir={data}', '--skip-test-db',
                        '--auth-root-authentication-method=normal'], stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, check=True)
        shutil.copytree(data, 'plain')
        for name, more in (('plain', ['--skip-networking', '--innodb-use-native-aio=0']),
                           ('uring', [f'--port={self.port}', f'--bind-address={HOST}'])):
            self.run('mariadbd', *options, f'--datadir={Path(name).absolute()}', '--socket=socket', '--pid-file=pid',
                     *more)
            while self.once(name, 'select 1') != '1':
                is_(self.server.poll(), None)
                time.sleep(0.01)
            self.once(name, 'create database d; create table d.t(n int primary key); create table d.s(n int)')
        self.sessions = [
            subprocess.Popen(self.client(*where), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for where in (['--socket=plain/socket'], ['--protocol=tcp', f'--host={HOST}', f'--port={self.port}'])]
        for session in self.sessions:
            is_(self.ask(session, 'begin; insert into t values (0); select count(*) from t;'), '1')
        self.submitted = self.requests()

    def client(self, *where: str) -> list[str]:
        return ['mariadb', '--no-defaults', '-uroot', '-NBn', *where, 'd']

    def once(self, name: str, commands: str) -> str:
        done = subprocess.run([*self.client(f'--socket={name}/socket')[:-1], '-e', commands], capture_output=True,
                              text=True, check=False)
        return done.stdout.strip()

    def ask(self, session: 'subprocess.Popen[str]', commands: str) -> str:
        assert session.stdin
        assert session.stdout
        session.stdin.write(commands + '\n')
        session.stdin.flush()
        return session.stdout.readline().strip()

    def requests(self) -> int:
        """The requests of the io_uring of the second server."""
        files = Path(f'/proc/{self.server.pid}/fd')
        [ring] = [file.name for file in files.iterdir() if str(file.readlink()) == 'anon_inode:[io_uring]']
        text = (files.parent / 'fdinfo' / ring).read_text()
        return int(re.findall(r'^SqHead:\s+(\d+)', text, re.MULTILINE)[0])

    def use(self, number: int) -> None:
        for name, session in zip(('plain', 'uring'), self.sessions, strict=True):
            is_(self.ask(session, f'insert into t values ({number}); select count(*) from t;'), str(number + 1))
            is_(self.once(name, f'insert into d.s values ({number}); flush tables d.s for export; unlock tables; '
                          'select count(*) from d.s; select count(*) from d.t'), f'{number}\n0')
            if number == 5:
                is_(self.ask(session, 'commit; select count(*) from t;'), '6')
                is_(self.once(name, 'select count(*) from d.t'), '6')
        before, self.submitted = self.submitted, self.requests()
        assert self.submitted > before, 'no request of the io_uring'


class Mosquitto(Served):
    """A subscriber, and a publisher in each round."""

    def start(self) -> None:
        Path('mosquitto.conf').write_text(f'listener {self.port} {HOST}\nallow_anonymous true\n')
        self.run('mosquitto', '-c', 'mosquitto.conf')
        self.connect((HOST, self.port)).close()
        self.subscriber = subprocess.Popen(['mosquitto_sub', '-p', str(self.port), '-t', 'news', '-q', '2'],
                                           stdout=subprocess.PIPE)
        time.sleep(1)

    def use(self, number: int) -> None:
        subprocess.run(['mosquitto_pub', '-p', str(self.port), '-t', 'news', '-q', '2', '-m', str(number)], check=True)
        assert self.subscriber.stdout
        is_(self.subscriber.stdout.readline(), b'%d\n' % number)
