# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers of HTTP."""

import http.client
import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path

from base import HOST, Served, asked, is_

NGINX = """
daemon off; worker_processes 2; pid nginx.pid; error_log error.log; user {user};
events {{ }}
http {{
    access_log access.log; client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi; scgi_temp_path scgi; keepalive_timeout 1000;
    server {{ listen {host}:{port} reuseport; listen unix:nginx.sock; root {root}; }}
}}
"""


class Web(Served):
    """An HTTP server, and a connection to it that is kept."""

    def listen(self, *command: str) -> None:
        self.run(*command)
        self.connect((HOST, self.port)).close()
        self.http = http.client.HTTPConnection(HOST, self.port, timeout=20)
        self.http.connect()
        self.kept = self.http.sock

    def get(self, path: str) -> bytes:
        self.http.request('GET', path)
        answer = self.http.getresponse().read()
        assert self.http.sock is self.kept, 'the connection was not kept'
        return answer


class Pages(Web):
    """A server of files."""

    def use(self, number: int) -> None:
        is_(self.get('/page'), b'hello\n')
        with self.connect((HOST, self.port)) as new:
            assert asked(new, b'GET /page HTTP/1.0\r\n\r\n', 12).startswith(b'HTTP/1.1 200')


class Counting(Web):
    """A server that counts its requests."""

    def use(self, number: int) -> None:
        is_(self.get('/'), b'%d\n' % number)


class Nginx(Pages):
    """Two workers, with a listener each."""

    def start(self) -> None:
        user = pwd.getpwuid(os.geteuid()).pw_name
        Path('nginx.conf').write_text(NGINX.format(host=HOST, port=self.port, root=Path.cwd(), user=user))
        Path('page').write_text('hello\n')
        self.listen('nginx', '-e', 'error.log', '-p', str(Path.cwd()), '-c', 'nginx.conf')


APACHE = """
ServerName {host}
Listen {host}:{port}
User www-data
Group www-data
PidFile {directory}/pid
ErrorLog {directory}/error.log
Mutex file:{directory}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
DocumentRoot {directory}/pages
StartServers 2
ServerLimit 2
MaxRequestWorkers 50
KeepAliveTimeout 1000
MaxKeepAliveRequests 0
<Directory {directory}/pages>
Require all granted
AllowOverride None
</Directory>
"""


class Apache(Pages):
    """Workers under the load of ab(1), which counts each request that fails."""

    def start(self) -> None:
        Path('pages').mkdir()
        Path('pages/page').write_text('hello\n')
        Path('apache.conf').write_text(APACHE.format(host=HOST, port=self.port, directory=Path.cwd()))
        self.listen('/usr/sbin/apache2', '-DFOREGROUND', '-f', str(Path('apache.conf').absolute()))
        self.load = subprocess.Popen(['ab', '-q', '-k', '-c', '8', '-t', '3600', '-n', '100000000',
                                      f'http://{HOST}:{self.port}/page'], stdout=subprocess.PIPE,
                                     stderr=subprocess.STDOUT, text=True)

    def use(self, number: int) -> None:
        super().use(number)
        assert self.load.poll() is None, self.load.communicate()
        if number == 5:
            self.load.send_signal(signal.SIGINT)
            said, _ = self.load.communicate(timeout=20)
            assert re.search(r'Complete requests: +[1-9][0-9]{2}', said), said
            assert re.search(r'Failed requests: +0\n', said), said


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


class Node(Counting):
    """The sum is kept by a worker thread."""

    def start(self) -> None:
        self.listen('node', '-e', NODE, '--', str(self.port))


class Java(Counting):

    def start(self) -> None:
        Path('Served.java').write_text(JAVA)
        self.listen('java', '-Dsun.net.httpserver.idleInterval=1000', 'Served.java', str(self.port))


WSGI = """
count = 0
def app(environ, start_response):
    global count
    count += 1
    start_response('200 OK', [('Content-Length', str(len(str(count)) + 1))])
    return [b'%d\\n' % count]
"""


class Gunicorn(Counting):
    """Two workers with threads, and an arbiter that kills a worker from which it has not heard."""

    def start(self) -> None:
        Path('app.py').write_text(WSGI)
        self.listen(sys.executable, '-m', 'gunicorn', '--worker-class', 'gthread', '--workers', '2', '--threads', '2',
                    '--keep-alive', '1000', '--timeout', '30', '--bind', f'{HOST}:{self.port}', 'app:app')


ASGI = """
count = 0
async def app(scope, receive, send):
    global count
    assert scope['type'] == 'http'
    count += 1
    body = b'%d\\n' % count
    headers = [(b'content-length', b'%d' % len(body))]
    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
    await send({'type': 'http.response.body', 'body': body})
"""


class Uvicorn(Counting):
    """A supervisor and two workers, which it spawns."""

    def start(self) -> None:
        Path('app.py').write_text(ASGI)
        self.listen(sys.executable, '-m', 'uvicorn', '--lifespan', 'off', '--workers', '2', '--timeout-keep-alive',
                    '1000', '--host', HOST, '--port', str(self.port), 'app:app')


GO = """
package main

import (
	"fmt"
	"net/http"
	"os"
	"sync/atomic"
)

func main() {
	var count int64
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d\\n", atomic.AddInt64(&count, 1))
	})
	panic(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}
"""


class Go(Counting):

    def start(self) -> None:
        Path('served.go').write_text(GO)
        subprocess.run(['go', 'build', '-o', 'served', 'served.go'], check=True,
                       env={**os.environ, 'HOME': str(Path.cwd()), 'GOCACHE': f'{Path.cwd()}/cache'})
        self.listen('./served', str(self.port))
