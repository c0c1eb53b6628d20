# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server and a client of it in one tree: served.py NAME PORT.

The client keeps its connections. A line in the FIFO `ask` lets it use them once; it answers with a line in the FIFO
`answer`: the number of the round, or what is wrong. Servers keep no file but in the working directory.
"""

import asyncio
import http.client
import multiprocessing
import os
import pwd
import socket
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from pathlib import Path

HOST = '127.0.0.1'


class Served(ABC):
    """A server that runs, and connections to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.start()

    @abstractmethod
    def start(self) -> None:
        """Start the server and connect to it."""

    @abstractmethod
    def use(self, number: int) -> None:
        """Round `number`, from 1: read what the last round has written, and write. AssertionError."""

    def run(self, *command: str) -> None:
        with Path('server.log').open('ab') as log:
            self.server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def connect(self, address: str | tuple[str, int]) -> socket.socket:
        """A connection to a server that may still be starting."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        while True:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.connect(address)
            except OSError:
                sock.close()
                if self.server.poll() is not None:
                    raise
                time.sleep(0.01)
            else:
                sock.settimeout(20)
                return sock


def asked(sock: socket.socket, request: bytes, size: int) -> bytes:
    sock.sendall(request)
    answer = b''
    while len(answer) < size:
        more = sock.recv(size - len(answer))
        assert more, f'end of file after {answer!r}'
        answer += more
    return answer


def is_(value: object, wanted: object) -> None:
    assert value == wanted, f'{value!r}, not {wanted!r}'


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


NGINX = """
daemon off; worker_processes 2; pid nginx.pid; error_log error.log; user {user};
events {{ }}
http {{
    access_log access.log; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; keepalive_timeout 1000;
    server {{ listen {host}:{port} reuseport; listen unix:nginx.sock; root {root}; }}
}}
"""


class Nginx(Served):
    """Two workers, with a listener each, and a connection that is kept."""

    def start(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        Path('nginx.conf').write_text(NGINX.format(host=HOST, port=self.port, root=Path.cwd(), user=user))
        Path('page').write_text('hello\n')
        self.run('nginx', '-e', 'error.log', '-p', str(Path.cwd()), '-c', 'nginx.conf')
        self.connect((HOST, self.port)).close()
        self.http = http.client.HTTPConnection(HOST, self.port, timeout=20)
        self.http.connect()
        self.kept = self.http.sock

    def use(self, number: int) -> None:
        self.http.request('GET', '/page')
        is_(self.http.getresponse().read(), b'hello\n')
        assert self.http.sock is self.kept, 'the connection was not kept'
        with self.connect((HOST, self.port)) as new:
            assert asked(new, b'GET /page HTTP/1.0\r\n\r\n', 12).startswith(b'HTTP/1.1 200')


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


NODE = """
const { Worker } = require('worker_threads')
const sums = "const { parentPort } = require('worker_threads'); let sum = 0;" +
             "parentPort.on('message', n => parentPort.postMessage(sum += n))"
const worker = new Worker(sums, { eval: true })
const server = require('http').createServer((request, response) => {
  worker.once('message', sum => response.end(`${sum}\\n`))
  worker.postMessage(1)
})
server.keepAliveTimeout = 1e6
server.listen(Number(process.argv[1]), '127.0.0.1')
"""

JAVA = """
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;

class Served {
    public static void main(String[] args) throws Exception {
        AtomicInteger sum = new AtomicInteger();
        HttpServer server = HttpServer.create(new InetSocketAddress("127.0.0.1", Integer.parseInt(args[0])), 0);
        server.setExecutor(Executors.newFixedThreadPool(2));
        server.createContext("/", exchange -> {
            byte[] answer = (sum.incrementAndGet() + "\\n").getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.start();
    }
}
"""


class Counting(Served):
    """An HTTP server that counts its requests, and a connection that is kept."""

    def listen(self, *command: str) -> None:
        self.run(*command, str(self.port))
        self.connect((HOST, self.port)).close()
        self.http = http.client.HTTPConnection(HOST, self.port, timeout=20)
        self.http.connect()
        self.kept = self.http.sock

    def use(self, number: int) -> None:
        self.http.request('GET', '/')
        is_(self.http.getresponse().read(), b'%d\n' % number)
        assert self.http.sock is self.kept, 'the connection was not kept'


class Node(Counting):
    """The sum is kept by a worker thread."""

    def start(self) -> None:
        self.listen('node', '-e', NODE, '--')


class Java(Counting):

    def start(self) -> None:
        Path('Served.java').write_text(JAVA)
        self.listen('java', '-Dsun.net.httpserver.idleInterval=1000', 'Served.java')


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


class Asyncio(Served):
    """An event loop with its self-pipe, a server and a client over TCP and a unix socket, in one process."""

    def start(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.add_signal_handler(10, lambda: None)
        self.loop.run_until_complete(self.connect_all())

    async def connect_all(self) -> None:
        self.servers = [await asyncio.start_server(self.echo, HOST, self.port),
                        await asyncio.start_unix_server(self.echo, 'echo.sock')]
        self.streams = [await asyncio.open_connection(HOST, self.port), await asyncio.open_unix_connection('echo.sock')]

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)

    def use(self, number: int) -> None:
        self.loop.run_until_complete(self.echoes(number))

    async def echoes(self, number: int) -> None:
        for reader, writer in self.streams:
            writer.write(b'%d\n' % number)
            is_(await asyncio.wait_for(reader.readline(), 20), b'%d\n' % number)
        is_(await asyncio.to_thread(lambda: number), number)


class Manager(Served):
    """multiprocessing: a manager, a queue and a lock between processes, and a server that forks."""

    def start(self) -> None:
        context = multiprocessing.get_context('forkserver')
        self.manager = context.Manager()
        self.rounds = self.manager.list()
        self.requests, self.answers, self.lock = context.Queue(), context.Queue(), context.Lock()
        self.child = context.Process(target=answer, args=(self.requests, self.answers, self.lock), daemon=True)
        self.child.start()
        self.context = context

    def use(self, number: int) -> None:
        self.rounds.append(number)
        is_(list(self.rounds), list(range(1, number + 1)))
        with self.lock:
            self.requests.put(number)
        is_(self.answers.get(timeout=20), number)
        other = self.context.Process(target=answer_once, args=(number, self.answers))
        other.start()
        is_(self.answers.get(timeout=20), -number)
        other.join(20)
        is_(other.exitcode, 0)


def answer(requests: 'multiprocessing.Queue[int]', answers: 'multiprocessing.Queue[int]', lock: object) -> None:
    while True:
        number = requests.get()
        with lock:      # type: ignore[attr-defined]
            answers.put(number)


def answer_once(number: int, answers: 'multiprocessing.Queue[int]') -> None:
    answers.put(-number)


SERVED = {'asyncio': Asyncio, 'java': Java, 'memcached': Memcached, 'mosquitto': Mosquitto, 'multiprocessing': Manager,
          'nginx': Nginx, 'node': Node, 'postgres': Postgres, 'redis': Redis}


def main(name: str, port: str) -> None:
    os.mkfifo('ask')
    os.mkfifo('answer')
    asks, answers = os.open('ask', os.O_RDWR | os.O_CLOEXEC), os.open('answer', os.O_RDWR | os.O_CLOEXEC)
    number, served = 0, SERVED[name](int(port))
    os.write(answers, b'0\n')
    while os.read(asks, 100):
        number += 1
        try:
            served.use(number)
            os.write(answers, b'%d\n' % number)
        except Exception:       # noqa: BLE001 -- whatever it is, the test shows it
            os.write(answers, traceback.format_exc().replace('\n', ' / ').encode()[:4000] + b'\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
