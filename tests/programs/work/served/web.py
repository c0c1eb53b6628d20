# SPDX-License-Identifier: LGPL-2.1-or-later
"""Servers of HTTP: nginx, and those that node and java bring."""

import http.client
import os
import pwd
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
